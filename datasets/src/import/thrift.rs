//! Reads the parts of Parquet's own records (Thrift's compact protocol) that tell how much memory a file needs, before
//! the Parquet reader allocates it.

use crate::limits::PARQUET_DEPTH;

/// Deepest nesting of the records themselves.
const DEPTH: usize = 64;

/// Type of a field in the compact protocol.
const BINARY: u8 = 8;
const LIST: u8 = 9;
const STRUCT: u8 = 12;

/// The rest of the bytes of a record.
pub(super) struct Compact<'a> {
    bytes: &'a [u8],
    position: usize,
}

/// The bytes end before the record does, or are no record.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BadRecord;

impl<'a> Compact<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Compact<'a> {
        Compact { bytes, position: 0 }
    }

    /// Number of bytes that were read.
    pub(super) fn position(&self) -> usize {
        self.position
    }

    fn byte(&mut self) -> Result<u8, BadRecord> {
        let byte = self.bytes.get(self.position).ok_or(BadRecord)?;
        self.position += 1;
        Ok(*byte)
    }

    fn advance(&mut self, bytes: u64) -> Result<(), BadRecord> {
        let bytes = usize::try_from(bytes).map_err(|_| BadRecord)?;
        let end = self.position.checked_add(bytes).ok_or(BadRecord)?;
        if end > self.bytes.len() {
            return Err(BadRecord);
        }
        self.position = end;
        Ok(())
    }

    fn varint(&mut self) -> Result<u64, BadRecord> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(BadRecord)
    }

    /// Reads a signed whole number.
    pub(super) fn number(&mut self) -> Result<i64, BadRecord> {
        let value = self.varint()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// Reads the head of a field of a record: its id and type, or `None` at the record's end.
    pub(super) fn field(&mut self, last_id: &mut i64) -> Result<Option<(i64, u8)>, BadRecord> {
        let head = self.byte()?;
        if head == 0 {
            return Ok(None);
        }
        *last_id = match head >> 4 {
            0 => self.number()?,
            delta => *last_id + i64::from(delta),
        };
        Ok(Some((*last_id, head & 0x0f)))
    }

    /// Reads the head of a list: its length and the type of its elements. Each element has at least one byte.
    fn list(&mut self) -> Result<(u64, u8), BadRecord> {
        let head = self.byte()?;
        let length = match head >> 4 {
            15 => self.varint()?,
            length => u64::from(length),
        };
        match length > (self.bytes.len() - self.position) as u64 {
            true => Err(BadRecord),
            false => Ok((length, head & 0x0f)),
        }
    }

    /// Skips the value of a field.
    pub(super) fn skip(&mut self, kind: u8) -> Result<(), BadRecord> {
        self.skip_nested(kind, DEPTH, false)
    }

    fn skip_nested(&mut self, kind: u8, depth: usize, is_element: bool) -> Result<(), BadRecord> {
        let inner = depth.checked_sub(1).ok_or(BadRecord)?;
        match kind {
            // A field's head holds a truth value; an element has a byte.
            1 | 2 if !is_element => Ok(()),
            1..=3 => self.advance(1),
            4..=6 => self.varint().map(drop),
            7 => self.advance(8),
            BINARY => self.varint().and_then(|length| self.advance(length)),
            LIST | 10 => {
                let (length, element) = self.list()?;
                (0..length).try_for_each(|_| self.skip_nested(element, inner, true))
            }
            11 => {
                let length = self.varint()?;
                let kinds = if length > 0 { self.byte()? } else { 0 };
                (0..length).try_for_each(|_| {
                    self.skip_nested(kinds >> 4, inner, true)?;
                    self.skip_nested(kinds & 0x0f, inner, true)
                })
            }
            STRUCT => {
                let mut id = 0;
                while let Some((_, kind)) = self.field(&mut id)? {
                    self.skip_nested(kind, inner, false)?;
                }
                Ok(())
            }
            13 => self.advance(16),
            _ => Err(BadRecord),
        }
    }
}

/// Checks a footer: each list fits in it, and the columns are nested at most [`PARQUET_DEPTH`] deep. Returns the depth.
pub(super) fn footer_depth(bytes: &[u8]) -> Result<usize, BadRecord> {
    let mut footer = Compact::new(bytes);
    let (mut id, mut depth) = (0, 0);
    while let Some((field, kind)) = footer.field(&mut id)? {
        match (field, kind) {
            (2, LIST) => depth = schema_depth(&mut footer)?,
            _ => footer.skip(kind)?,
        }
    }
    Ok(depth)
}

/// Reads the list of columns, which is a tree in which every inner node has its number of children.
fn schema_depth(footer: &mut Compact<'_>) -> Result<usize, BadRecord> {
    let (length, _) = footer.list()?;
    // The number of children to come of each open node.
    let mut open: Vec<u64> = Vec::new();
    let mut deepest = 0;
    for _ in 0..length {
        let (mut id, mut children) = (0, 0);
        while let Some((field, kind)) = footer.field(&mut id)? {
            match (field, kind) {
                (5, 4..=6) => children = footer.number()?,
                _ => footer.skip(kind)?,
            }
        }
        let children = u64::try_from(children).map_err(|_| BadRecord)?;
        if children > length {
            return Err(BadRecord);
        }
        if let Some(parent) = open.last_mut() {
            *parent -= 1;
        }
        open.push(children);
        while open.pop_if(|children| *children == 0).is_some() {}
        deepest = deepest.max(open.len());
        if deepest > PARQUET_DEPTH {
            break;
        }
    }
    Ok(deepest)
}

/// The head of a page.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct PageHead {
    pub(super) is_dictionary: bool,
    /// Size in memory, bytes.
    pub(super) unpacked: u64,
    /// Size in the file, bytes.
    pub(super) packed: u64,
    pub(super) values: u64,
}

/// Reads the head of a page; returns it with its length.
pub(super) fn page_head(bytes: &[u8]) -> Result<(PageHead, usize), BadRecord> {
    let mut head = Compact::new(bytes);
    let (mut id, mut page) = (0, PageHead::default());
    let size = |number: i64| u64::try_from(number).map_err(|_| BadRecord);
    while let Some((field, kind)) = head.field(&mut id)? {
        match (field, kind) {
            (2, 4..=6) => page.unpacked = size(head.number()?)?,
            (3, 4..=6) => page.packed = size(head.number()?)?,
            // The heads of a data page, a dictionary, and a data page of the second form begin with a count of values.
            (5 | 7 | 8, STRUCT) => {
                page.is_dictionary |= field == 7;
                let mut inner = 0;
                while let Some((field, kind)) = head.field(&mut inner)? {
                    match (field, kind) {
                        (1, 4..=6) => page.values = size(head.number()?)?,
                        _ => head.skip(kind)?,
                    }
                }
            }
            _ => head.skip(kind)?,
        }
    }
    Ok((page, head.position()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A footer with nested columns: `depth` nodes with one child each, and a leaf.
    fn nested(depth: usize) -> Vec<u8> {
        // Field 2 is a list of structs with a long length.
        let mut bytes = vec![0x29, 0xfc];
        let mut length = depth + 1;
        while length > 0x7f {
            bytes.push((length & 0x7f) as u8 | 0x80);
            length >>= 7;
        }
        bytes.push(length as u8);
        // Field 5 is a number, 1 in zigzag.
        (0..depth).for_each(|_| bytes.extend([0x55, 2, 0]));
        bytes.extend([0, 0]);
        bytes
    }

    #[test]
    fn the_depth_of_columns_is_found_without_recursion() {
        assert_eq!(footer_depth(&nested(3)), Ok(3));
        assert!(footer_depth(&nested(100_000)).unwrap() > PARQUET_DEPTH);
    }

    #[test]
    fn records_that_promise_more_than_they_have_are_refused() {
        // A list of 2^31 structs, a node with 2^31 children, and records that are cut off.
        assert_eq!(
            footer_depth(&[0x29, 0xfc, 0xff, 0xff, 0xff, 0xff, 0x07, 0]),
            Err(BadRecord)
        );
        assert_eq!(
            footer_depth(&[0x29, 0x1c, 0x55, 0xfe, 0xff, 0xff, 0xff, 0x0f, 0, 0]),
            Err(BadRecord)
        );
        let whole = nested(5);
        for end in 0..whole.len() {
            assert_eq!(footer_depth(&whole[..end]), Err(BadRecord));
        }
        // Structs in structs.
        assert_eq!(footer_depth(&[0x1c; 1000]), Err(BadRecord));
    }

    #[test]
    fn the_head_of_a_page_has_its_sizes() {
        // type 0, unpacked 200, packed 100, data_page_header { values 3 }.
        let bytes = [
            0x15, 0, 0x15, 0x90, 0x03, 0x15, 0xc8, 0x01, 0x2c, 0x15, 6, 0, 0, 9, 9,
        ];
        let (head, length) = page_head(&bytes).unwrap();
        assert_eq!(length, 13);
        assert_eq!(
            head,
            PageHead {
                is_dictionary: false,
                unpacked: 200,
                packed: 100,
                values: 3
            }
        );
        assert_eq!(page_head(&bytes[..12]), Err(BadRecord));
    }
}
