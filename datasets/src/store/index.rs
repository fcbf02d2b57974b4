//! The ordinals of units, by name.

use crate::error::Error;

/// Finds the ordinal of a unit by its name: the prompt's id, and which sample of the prompt. Takes 16 bytes a unit.
pub struct UnitIndex {
    /// Hash of each unit's name with its ordinal, sorted by hash.
    entries: Vec<(u64, u32)>,
}

impl UnitIndex {
    /// Indexes units in the order of their ordinals; `capacity` is their expected number.
    ///
    /// # Errors
    /// Those of the iterator; [`Error::DuplicateUnit`] if two names have the same hash; [`Error::StoreLimit`] for more
    /// than 2³² units.
    pub fn new<E: From<Error>>(
        capacity: usize,
        units: impl Iterator<Item = Result<(String, u32), E>>,
    ) -> Result<UnitIndex, E> {
        let mut entries = Vec::with_capacity(capacity);
        for (ordinal, unit) in units.enumerate() {
            let (prompt_id, sample_index) = unit?;
            let ordinal = u32::try_from(ordinal).map_err(|_| Error::StoreLimit {
                what: "there are more than 4,294,967,295 answers",
            })?;
            entries.push((hash(&prompt_id, sample_index), ordinal));
        }
        entries.sort_unstable();
        let is_twice = |pair: &[(u64, u32)]| matches!(pair, [(a, _), (b, _)] if a == b);
        if entries.windows(2).any(is_twice) {
            return Err(Error::DuplicateUnit.into());
        }
        Ok(UnitIndex { entries })
    }

    /// Number of units.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no units.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The ordinal of a unit.
    pub fn find(&self, prompt_id: &str, sample_index: u32) -> Option<u32> {
        let hash = hash(prompt_id, sample_index);
        let at = self.entries.binary_search_by_key(&hash, |(h, _)| *h).ok()?;
        self.entries.get(at).map(|(_, ordinal)| *ordinal)
    }
}

/// The first 64 bits of a prompt's id, which is a hash already, combined with the sample.
fn hash(prompt_id: &str, sample_index: u32) -> u64 {
    let first = prompt_id
        .get(..16)
        .map(|digits| u64::from_str_radix(digits, 16));
    let id = match first {
        Some(Ok(id)) => id,
        // FNV-1a, for an id that is not a hash.
        _ => prompt_id.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        }),
    };
    id.wrapping_add(u64::from(sample_index).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}
