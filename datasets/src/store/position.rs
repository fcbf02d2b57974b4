//! The position of a unit's entry, in 8 bytes.

use crate::error::Error;

/// Position of an entry: 2 bits of [`UnitState`], and behind them for the journal 46 bits of the frame's offset and 16 of
/// the entry's row in the frame, or for a published folder 12 bits of its number, 24 of the shard and 24 of the row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position(u64);

const STATE_SHIFT: u32 = 62;
const OFFSET_BITS: u32 = 46;
const ROW_BITS: u32 = 16;
const FOLDER_BITS: u32 = 12;
const SHARD_BITS: u32 = 24;

/// Largest number of entries in a frame.
pub(super) const FRAME_ENTRIES: usize = 1 << ROW_BITS;

/// UnitState of a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum UnitState {
    /// The unit has no entry.
    Missing,
    /// The unit's record is in the journal.
    Record,
    /// The journal says that the unit failed.
    Failure,
    /// The unit's record is in a folder that was published before.
    Published,
}

impl UnitState {
    pub(super) fn has_record(self) -> bool {
        matches!(self, UnitState::Record | UnitState::Published)
    }
}

impl Position {
    pub(super) const MISSING: Position = Position(0);

    pub(super) fn in_journal(state: UnitState, offset: u64, row: usize) -> Result<Position, Error> {
        if offset >= 1 << OFFSET_BITS || row >= FRAME_ENTRIES {
            return Err(Error::StoreLimit {
                what: "the journal is larger than 64 TiB",
            });
        }
        Ok(Position(
            (state as u64) << STATE_SHIFT | offset << ROW_BITS | row as u64,
        ))
    }

    pub(super) fn published(folder: usize, shard: usize, row: usize) -> Result<Position, Error> {
        if folder >= 1 << FOLDER_BITS || shard >= 1 << SHARD_BITS || row >= 1 << SHARD_BITS {
            return Err(Error::StoreLimit {
                what: "there are more than 4096 published folders, or one has more than 16,777,216 shards or rows in a shard",
            });
        }
        let place = (folder as u64) << (2 * SHARD_BITS) | (shard as u64) << SHARD_BITS | row as u64;
        Ok(Position(
            (UnitState::Published as u64) << STATE_SHIFT | place,
        ))
    }

    pub(super) fn state(self) -> UnitState {
        match self.0 >> STATE_SHIFT {
            0 => UnitState::Missing,
            1 => UnitState::Record,
            2 => UnitState::Failure,
            _ => UnitState::Published,
        }
    }

    /// Offset of the frame in the journal, and row in the frame.
    pub(super) fn frame(self) -> (u64, usize) {
        let offset = self.bits(ROW_BITS, OFFSET_BITS);
        (offset, self.bits(0, ROW_BITS) as usize)
    }

    /// Number of the published folder, shard, and row in the shard.
    pub(super) fn published_row(self) -> (usize, u32, u32) {
        (
            self.bits(2 * SHARD_BITS, FOLDER_BITS) as usize,
            self.bits(SHARD_BITS, SHARD_BITS) as u32,
            self.bits(0, SHARD_BITS) as u32,
        )
    }

    fn bits(self, shift: u32, count: u32) -> u64 {
        self.0 >> shift & ((1 << count) - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_takes_eight_bytes_and_keeps_everything() {
        assert_eq!(size_of::<Position>(), 8);
        assert_eq!(Position::MISSING.state(), UnitState::Missing);
        for (offset, row) in [
            (8, 0),
            ((1 << OFFSET_BITS) - 1, FRAME_ENTRIES - 1),
            (12_345_678_901, 17),
        ] {
            for state in [UnitState::Record, UnitState::Failure] {
                let position = Position::in_journal(state, offset, row).unwrap();
                assert_eq!((position.state(), position.frame()), (state, (offset, row)));
            }
        }
        let position = Position::published(4095, (1 << 24) - 1, 77).unwrap();
        assert_eq!(
            (position.state(), position.published_row()),
            (UnitState::Published, (4095, (1 << 24) - 1, 77))
        );
        assert!(Position::in_journal(UnitState::Record, 1 << OFFSET_BITS, 0).is_err());
        assert!(Position::published(0, 0, 1 << 24).is_err());
    }
}
