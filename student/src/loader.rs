//! Reading ahead: a thread reads rows and plans steps while the model computes the steps before.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::time::Instant;

use potstill_datasets::{Arm, Order, SequenceLength, Signal};
use serde::Serialize;

use crate::batch::Batch;
use crate::control::ControlData;
use crate::error::{Error, SequenceId};
use crate::settings::{Overlong, SequenceOrder, TrainSettings};

/// Number of planned steps that wait for each replica, beside the one that the thread holds while all wait.
const WAITING: usize = 1;

/// Numbers of training rows that are longer than `max_length`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct OverlongRows {
    /// Rows that were left out.
    pub dropped: u64,
    /// Rows whose end was cut off.
    pub cut: u64,
}

/// Reads a row by its position.
pub type ReadRow<'a> =
    &'a mut (dyn FnMut(usize) -> Result<Signal, potstill_datasets::Error> + Send);

/// The rows that are trained on, in their order, and what is done with them before a step.
pub(crate) struct Loader<'a> {
    read: ReadRow<'a>,
    usable: Vec<usize>,
    order: Order,
    pub(crate) control: ControlData,
    pub(crate) overlong: OverlongRows,
}

/// Settings from which batches are made.
#[derive(Clone, Copy)]
pub(crate) struct BatchSettings<'a> {
    pub(crate) arm: Arm,
    pub(crate) settings: &'a TrainSettings,
    /// Number of the model's tokens.
    pub(crate) vocab: usize,
    /// Number of steps of the training.
    pub(crate) steps: u64,
}

/// A step and the number of sequences that were read before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// Step, counted from 1.
    pub(crate) step: u64,
    /// Number of sequences read since the start.
    pub(crate) position: u64,
}

impl<'a> Loader<'a> {
    /// Finds the rows that can be trained on. `lengths` has the length of each row, if it is known without reading the
    /// row; a control that needs the distributions of all rows reads them anyway.
    ///
    /// # Errors
    /// An error of a row that is read; a row without loss; nothing to train on.
    pub(crate) fn new(
        read: ReadRow<'a>,
        len: usize,
        lengths: Option<&[SequenceLength]>,
        mut control: ControlData,
        settings: &TrainSettings,
    ) -> Result<Self, Error> {
        let mut usable = Vec::with_capacity(len);
        let mut overlong = OverlongRows::default();
        let mut tokens = Vec::with_capacity(len);
        let known = lengths.filter(|lengths| lengths.len() == len && !control.reads_rows());
        for index in 0..len {
            let (length, signal) = match known {
                Some(lengths) => (lengths[index], None),
                None => {
                    let signal = read(index)?;
                    (SequenceLength::of(&signal), Some(signal))
                }
            };
            let is_cut = length.tokens > settings.max_length;
            let has_loss = (length.first_loss).is_some_and(|first| first < settings.max_length);
            if is_cut && (settings.overlong == Overlong::Drop || !has_loss) {
                overlong.dropped += 1;
                continue;
            }
            if length.first_loss.is_none() {
                let signal = signal.map_or_else(|| read(index), Ok)?;
                return Err(Error::NoLossPositions {
                    row: index,
                    sequence: SequenceId::of(&signal),
                });
            }
            overlong.cut += u64::from(is_cut);
            if let Some(mut signal) = signal {
                cut(&mut signal, settings.max_length);
                control.read(&signal);
            }
            usable.push(index);
            tokens.push(length.tokens.min(settings.max_length));
        }
        if usable.is_empty() {
            return Err(Error::NothingToTrain {
                rows: len,
                dropped: overlong.dropped as usize,
                max_length: settings.max_length,
            });
        }
        let order = match settings.order {
            SequenceOrder::Random => Order::new(settings.seed, usable.len())?,
            SequenceOrder::ByLength => Order::by_length(settings.seed, tokens, settings.batch)?,
        };
        Ok(Self {
            read,
            usable,
            order,
            control,
            overlong,
        })
    }

    /// Number of rows that can be trained on.
    pub(crate) fn len(&self) -> usize {
        self.usable.len()
    }

    /// Reads the rows of a step and plans it.
    fn batch(&mut self, place: Place, of: BatchSettings<'_>) -> Result<Batch, Error> {
        let settings = of.settings;
        let mut signals = Vec::with_capacity(settings.batch);
        for position in place.position..place.position + settings.batch as u64 {
            let mut signal = (self.read)(self.usable[self.order.item(position)])?;
            cut(&mut signal, settings.max_length);
            self.control.replace_rows(&mut signal, position);
            signals.push(signal);
        }
        Batch::new(signals, of.arm, settings, place.step, of.vocab)
    }

    /// Makes batches and sends them to all queues, from the place that the first queue asked for last, until the first queue
    /// is dropped. An error goes to the first queue.
    pub(crate) fn run(&mut self, sender: BatchSender, of: BatchSettings<'_>) {
        let BatchSender { asked, batches } = sender;
        let mut next: Option<Place> = None;
        loop {
            // Without a step to make, this thread waits until it is asked for one or the training ends.
            let wanted = match next.filter(|place| place.step <= of.steps) {
                Some(place) => asked.try_recv().unwrap_or(place),
                None => match asked.recv() {
                    Ok(place) => place,
                    Err(_) => return,
                },
            };
            let is_sent = match self.batch(wanted, of) {
                Ok(batch) => {
                    let batch = Arc::new(batch);
                    next = Some(Place {
                        step: wanted.step + 1,
                        position: wanted.position + of.settings.batch as u64,
                    });
                    (batches.iter()).all(|queue| queue.send((wanted, Ok(batch.clone()))).is_ok())
                }
                Err(error) => {
                    next = None;
                    batches[0].send((wanted, Err(error))).is_ok()
                }
            };
            if !is_sent {
                return;
            }
        }
    }
}

type PlannedStep = (Place, Result<Arc<Batch>, Error>);

/// The loader's ends of the queues of all replicas.
pub(crate) struct BatchSender {
    asked: Receiver<Place>,
    batches: Vec<SyncSender<PlannedStep>>,
}

/// The planned steps of a replica, in order.
pub(crate) struct BatchQueue {
    batches: Receiver<PlannedStep>,
    /// Asks the loader to go on at another place; only the first queue does.
    ask: Option<Sender<Place>>,
    expected: Option<Place>,
}

/// Creates a queue for each of `replicas` replicas, all of which get the same batches.
pub(crate) fn queues(replicas: usize) -> (BatchSender, Vec<BatchQueue>) {
    let (ask, asked) = channel();
    let mut ask = Some(ask);
    let (batches, queues) = (0..replicas.max(1))
        .map(|_| {
            let (sender, receiver) = sync_channel(WAITING);
            let queue = BatchQueue {
                batches: receiver,
                ask: ask.take(),
                expected: None,
            };
            (sender, queue)
        })
        .unzip();
    (BatchSender { asked, batches }, queues)
}

impl BatchQueue {
    /// Waits for the batch of a step. Also returns how long this took, in seconds. `None` if the loader ended, which has
    /// sent its error to the first queue.
    pub(crate) fn next(&mut self, place: Place) -> Option<(Result<Arc<Batch>, Error>, f64)> {
        let began = Instant::now();
        if self.expected != Some(place)
            && let Some(ask) = &self.ask
        {
            ask.send(place).ok()?;
        }
        loop {
            let (found, batch) = self.batches.recv().ok()?;
            // Batches that were made before the loader was asked for another place are left out.
            if found == place {
                if let Ok(batch) = &batch {
                    self.expected = Some(Place {
                        step: place.step + 1,
                        position: place.position + batch.signals.len() as u64,
                    });
                }
                return Some((batch, began.elapsed().as_secs_f64()));
            }
        }
    }
}

/// Cuts a sequence to `max_length` tokens. The end-of-sequence token that is cut off is not replaced.
fn cut(signal: &mut Signal, max_length: usize) {
    if signal.token_ids.len() > max_length {
        signal.token_ids.truncate(max_length);
        signal.loss_mask.truncate(max_length);
        let positions = signal.loss_positions().count();
        signal.rows.truncate(positions);
    }
}
