//! The trainer: model, optimizer and files between two steps.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use burn::module::Module;
use potstill_datasets::Arm;
use potstill_model::Decoder;

use crate::batch::Batch;
use crate::checkpoint::{self, Checkpoint, TrainingState};
use crate::collective::Collective;
use crate::error::Error;
use crate::gradient::{BatchGradient, gradient_of_share};
use crate::gradients::Gradients;
use crate::guard::{Action, Guard};
use crate::loss::Divergence;
use crate::metrics::{MetricsFile, StepMetrics, peak_bytes};
use crate::not_finite::blame;
use crate::objective::Objective;
use crate::operations::ModelOperations;
use crate::optimizer::{Optimizer, clip_global_norm};
use crate::precision::{Precision, cast};
use crate::replica::{Shard, whole_optimizer};
use crate::schedule::Schedule;
use crate::settings::TrainSettings;
use crate::tensorboard::EventFile;
use crate::trainable::{Trainable, track};

/// Settings of a training, resolved for one arm.
#[derive(Debug, Clone, Copy)]
pub struct TrainingPlan<'a> {
    /// Arm to train.
    pub arm: Arm,
    /// Settings of `[train]`, and the seed.
    pub settings: &'a TrainSettings,
    /// Number of steps and their learning rates.
    pub schedule: Schedule,
}

/// Measures a model, without autodiff, on dev.
pub(crate) type Measure<'a> = dyn FnMut(&Decoder) -> Result<f64, Error> + 'a;

/// The training loop's state besides the model, and the files that it writes.
pub(crate) struct Trainer<'a> {
    plan: TrainingPlan<'a>,
    trainable: Trainable,
    pub(crate) state: TrainingState,
    optimizer: Optimizer,
    /// The files of metrics, which rank 0 alone writes.
    files: Option<(MetricsFile, EventFile)>,
    /// The part of this replica among the others; `None` for a single replica.
    shard: Option<Shard>,
    operations: ModelOperations,
    /// Step of the checkpoint to which the guard sends the training back.
    return_to: Option<u64>,
}

impl<'a> Trainer<'a> {
    /// Opens the newest checkpoint in `dir`, or begins at `start`. The model that is returned is tracked. The files of metrics
    /// are cut to their lengths at the checkpoint, or to `written_bytes`.
    pub(crate) fn open(
        start: Decoder,
        rows: usize,
        plan: TrainingPlan<'a>,
        dir: &Path,
        written_bytes: Option<(u64, u64)>,
        collective: &mut dyn Collective,
    ) -> Result<(Self, Decoder), Error> {
        let settings = plan.settings;
        let (rank, size) = (collective.rank(), collective.size());
        if rank > 0 {
            // Rank 0 tidies the folder before the others read it.
            collective.sum_f64(&mut [])?;
        }
        let fresh = TrainingState {
            step: 0,
            position: 0,
            metrics_bytes: 0,
            events_bytes: 0,
            arm: plan.arm,
            settings: settings.identity(&plan.schedule),
            rows: rows as u64,
            guard: Guard::default(),
            dev: BTreeMap::new(),
            dev_of_mean: BTreeMap::new(),
        };
        let trainable = Trainable::of(&start, settings)?;
        let Checkpoint {
            mut state,
            mut model,
            mut optimizer,
        } = checkpoint::newest(dir, start, fresh, settings, &trainable)?;
        if let Some(bytes) = written_bytes {
            (state.metrics_bytes, state.events_bytes) = bytes;
        }
        if settings.precision == Precision::Bf16 {
            // A frozen part is a few routers in a training of the whole model, which its export takes from the masters.
            let has_master = |name: &str| trainable.is_whole() || trainable.contains(name);
            optimizer.begin(&model, &has_master);
            model = cast(model, settings.precision.dtype());
        }
        let mut files = None;
        if rank == 0 {
            let metrics = MetricsFile::open(dir, state.metrics_bytes)?;
            let (events, events_bytes) = EventFile::open(dir, state.events_bytes)?;
            state.events_bytes = events_bytes;
            files = Some((metrics, events));
        }
        if rank == 0 && size > 1 {
            collective.sum_f64(&mut [])?;
        }
        let shard = (size > 1).then(|| Shard::new(&model, &trainable, rank, size));
        if let Some(shard) = &shard {
            optimizer.keep(|name| shard.owns(name));
        }
        let operations = ModelOperations::of(model.config(), settings);
        let model = track(model, &trainable);
        let trainer = Self {
            plan,
            trainable,
            state,
            optimizer,
            files,
            shard,
            operations,
            return_to: None,
        };
        Ok((trainer, model))
    }

    /// Computes this replica's share of the gradient, and adds up those of all replicas.
    fn gradient(
        &mut self,
        model: &Decoder,
        batch: &Batch,
        collective: &mut dyn Collective,
    ) -> Result<BatchGradient, Error> {
        let ranks = (collective.rank(), collective.size());
        let mut result = gradient_of_share(model, batch, self.plan.settings, ranks);
        if let Some(shard) = &mut self.shard {
            let divergences = batch.objective.divergences().len();
            let device = model.device().inner();
            shard.sum(&mut result, divergences, &device, collective)?;
            result.loss = batch.row_weight() * result.sums.loss;
        }
        Ok(result)
    }

    /// Updates the parameters. Each replica updates its own part and gets the others.
    fn update(
        &mut self,
        model: Decoder,
        gradients: Gradients,
        (scale, rate): (f64, f64),
        collective: &mut dyn Collective,
    ) -> Result<Decoder, Error> {
        let Some(shard) = &mut self.shard else {
            return Ok(self.optimizer.step(model, gradients, scale, rate));
        };
        let own = shard.own(gradients);
        let model = self.optimizer.step(model, own, scale, rate);
        shard.gather(model, collective)
    }

    /// Makes one optimizer step and writes its metrics. `began` is the time at which waiting for the batch began, and
    /// `stall_seconds` the time until the batch was there.
    pub(crate) fn step(
        &mut self,
        model: Decoder,
        batch: &Batch,
        (began, stall_seconds): (Instant, f64),
        collective: &mut dyn Collective,
    ) -> Result<(Decoder, StepMetrics), Error> {
        let TrainingPlan {
            settings, schedule, ..
        } = self.plan;
        let step = self.state.step + 1;
        let result = self.gradient(&model, batch, collective)?;
        let (norm, scale) = clip_global_norm(&result.gradients, settings.clip);
        let skipped = self.skip_reason(&model, batch, (result.loss, norm))?;
        let rate = schedule.at(step) * self.state.guard.rate_factor(&settings.guard);
        let model = match skipped {
            None => self.update(model, result.gradients, (scale, rate), collective)?,
            Some(_) => model,
        };

        let tokens_per_second = batch.tokens as f64 / began.elapsed().as_secs_f64();
        let sums = &result.sums;
        let per_row = 1.0 / sums.rows.max(1) as f64;
        let metrics = StepMetrics {
            step,
            loss: result.loss,
            forward_kl: sums.forward_kl * per_row,
            cross_entropy: sums.cross_entropy * per_row,
            divergences: other_divergences(&settings.objective, &sums.divergences, per_row),
            teacher_nll: result.teacher_nll * per_row,
            gradient_norm: norm,
            term_gradient_norms: sums.term_norms.clone(),
            learning_rate: rate,
            loss_tokens: sums.rows as u64,
            tokens: batch.tokens as u64,
            tokens_per_second,
            mfu: self.utilisation(batch, tokens_per_second),
            stall_seconds,
            peak_bytes: peak_bytes(),
            skipped,
        };
        if let Some((file, events)) = &mut self.files {
            self.state.metrics_bytes += file.write(&metrics)?;
            self.state.events_bytes += events.write(&metrics)?;
        }
        self.state.step = step;
        self.state.position += settings.batch as u64;
        Ok((model, metrics))
    }

    /// Computes the model FLOP utilisation of a step, if the peak of the device is known.
    fn utilisation(&self, batch: &Batch, tokens_per_second: f64) -> Option<f64> {
        let TrainSettings { peak_flops, .. } = self.plan.settings;
        let lengths = batch.signals.iter().map(|signal| signal.token_ids.len());
        let operations = self.operations.of_lengths(lengths) / batch.tokens.max(1) as f64;
        // Replicas have a device each.
        let devices = self.shard.as_ref().map_or(1, Shard::size);
        Some(operations * tokens_per_second / ((*peak_flops)? * devices as f64))
    }

    /// Lets the guard decide about the step that is computed. Returns why it is skipped.
    ///
    /// # Errors
    /// The fault of the step, with the rows that are to blame, if training cannot go on.
    fn skip_reason(
        &mut self,
        model: &Decoder,
        batch: &Batch,
        (loss, norm): (f64, f64),
    ) -> Result<Option<String>, Error> {
        let (step, settings) = (self.state.step + 1, self.plan.settings);
        let Some(fault) = self.state.guard.fault(loss, norm, &settings.guard) else {
            self.state.guard.made(norm);
            return Ok(None);
        };
        let error = blame(model, batch, fault, settings, step)?;
        let text = error.to_string();
        let fault_text = text.lines().next().unwrap_or_default();
        // If no row has a finite gradient, the weights are to blame.
        let is_of_weights = matches!(
            &error,
            Error::NotFinite { rows, batch, .. } if *batch > 1 && rows.len() == *batch
        );
        match self.state.guard.decide(!is_of_weights, &settings.guard) {
            Action::Stop => Err(error),
            Action::Return(step) => {
                self.return_to = Some(step);
                let factor = settings.guard.rate_factor;
                Ok(Some(format!(
                    "{fault_text}; training goes back to the checkpoint after step {step}, with {factor} times the learning rate"
                )))
            }
            _ => Ok(Some(format!("{fault_text}; the step is skipped"))),
        }
    }

    /// Whether the guard sends the training back to a checkpoint.
    pub(crate) fn must_return(&self) -> bool {
        self.return_to.is_some()
    }

    /// Goes back to a checkpoint. The metrics of the steps since then stay, and the guard's count of returns.
    pub(crate) fn go_back(
        self,
        model: Decoder,
        dir: &Path,
        collective: &mut dyn Collective,
    ) -> Result<(Self, Decoder), Error> {
        let TrainingState {
            rows,
            metrics_bytes,
            events_bytes,
            guard,
            ..
        } = self.state.clone();
        if collective.rank() == 0 {
            checkpoint::discard_after(dir, self.return_to.unwrap_or_default())?;
        }
        // `open` replaces the trained parameters by those of the checkpoint, so only the frozen ones of this model are used.
        let plan = self.plan;
        let start = masters(&self.optimizer, &model, plan.settings.precision);
        drop((self, model));
        let (mut trainer, model) = Self::open(
            start,
            rows as usize,
            plan,
            dir,
            Some((metrics_bytes, events_bytes)),
            collective,
        )?;
        trainer.state.guard = guard;
        Ok((trainer, model))
    }

    /// Saves a checkpoint after the metrics that it counts are on the disk. With `dev`, the model is measured first. All
    /// replicas call this, and rank 0 writes.
    pub(crate) fn save(
        &mut self,
        dir: &Path,
        model: &Decoder,
        dev: Option<&mut Measure<'_>>,
        collective: &mut dyn Collective,
    ) -> Result<(), Error> {
        let (step, every) = (self.state.step, self.plan.settings.checkpoint_every);
        self.state.guard.will_save(step, every);
        let whole = self.whole_optimizer(model, collective)?;
        let Some((metrics, events)) = &self.files else {
            return Ok(());
        };
        metrics.sync()?;
        events.sync()?;
        let optimizer = whole.as_ref().unwrap_or(&self.optimizer);
        let TrainingPlan { settings, .. } = self.plan;
        if let Some(dev) = dev {
            let state = &mut self.state;
            // A figure in f32 is the same after it was written as text and read back.
            let figure = dev(&masters(optimizer, model, settings.precision))? as f32;
            state.dev.insert(step, figure);
            if let Some(mean) = optimizer.mean_model(model) {
                state.dev_of_mean.insert(step, dev(&mean)? as f32);
            }
        }
        checkpoint::save(
            dir,
            &self.state,
            &optimizer.trained(model),
            optimizer,
            settings,
            &self.trainable,
        )
    }

    /// Ends the training, and returns its state and its model. All replicas call this; on other ranks than 0, the weights in
    /// half precision are rounded.
    pub(crate) fn end(
        self,
        model: Decoder,
        collective: &mut dyn Collective,
    ) -> Result<(TrainingState, TrainedModel), Error> {
        let precision = self.plan.settings.precision;
        let whole = match precision {
            Precision::F32 => None,
            Precision::Bf16 => self.whole_optimizer(&model, collective)?,
        };
        let trained = TrainedModel {
            model,
            optimizer: whole.unwrap_or(self.optimizer),
            precision,
        };
        Ok((self.state, trained))
    }

    /// The optimizer with the state of all replicas, on rank 0 of several.
    fn whole_optimizer(
        &self,
        model: &Decoder,
        collective: &mut dyn Collective,
    ) -> Result<Option<Optimizer>, Error> {
        match self.shard {
            Some(_) => whole_optimizer(&self.optimizer, &model.device().inner(), collective),
            None => Ok(None),
        }
    }
}

/// The model at the end of a training, in the type that was computed in, with its masters.
#[derive(Debug)]
pub(crate) struct TrainedModel {
    model: Decoder,
    optimizer: Optimizer,
    precision: Precision,
}

impl TrainedModel {
    /// Returns the model in f32 with the weights that are trained, without autodiff.
    pub(crate) fn masters(&self) -> Decoder {
        masters(&self.optimizer, &self.model, self.precision)
    }
}

/// Returns the model in f32 with the weights that are trained, without autodiff.
fn masters(optimizer: &Optimizer, model: &Decoder, precision: Precision) -> Decoder {
    match precision {
        Precision::F32 => model.valid(),
        Precision::Bf16 => optimizer.masters(model),
    }
}

/// Means of the divergences that have no field of their own in [`StepMetrics`].
fn other_divergences(objective: &Objective, sums: &[f64], per_row: f64) -> BTreeMap<String, f64> {
    let terms = objective.divergences();
    let named = terms.iter().zip(sums);
    named
        .filter(|(term, _)| term.divergence != Divergence::ForwardKl)
        .map(|(term, sum)| (term.divergence.name().to_owned(), sum * per_row))
        .collect()
}
