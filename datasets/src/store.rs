//! The store of what a run acquires unit by unit: teachers' answers and signals.
//!
//! A *unit* is one thing to acquire, such as sample 2 of a prompt. Units are ordered, and a unit's place in that order is
//! its *ordinal*. An *entry* is a unit's record, or the reason why it has none.
//!
//! 1. Entries that complete together become one frame of a [`Journal`]: on the disk before they count, and present as
//!    a whole or not at all.
//! 2. Memory holds 8 bytes for each unit: the position of its entry in the journal or in a folder that was published
//!    before. While a journal is opened, a [`UnitIndex`] needs 16 more.
//! 3. When every unit has an entry, [`publish_answers`] or [`publish_signals`] writes the entries as shards in the order
//!    of units. The same entries give the same bytes, whatever order they arrived in.

mod entries;
mod frames;
mod index;
mod journal;
mod position;
mod publish;
mod record;

pub use self::entries::{Store, Tally};
pub use self::index::UnitIndex;
pub use self::journal::{FrameSpan, Journal};
pub use self::publish::{Published, Tables, publish_answers, publish_signals};
pub use self::record::{Answer, Entry, StoredRecord};
