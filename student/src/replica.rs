//! The numbers that the replicas of a training exchange in a step. Each replica has the whole model, and the optimizer's state of a
//! part of it: the trained parameters in order are one row of numbers, which is divided between two parameters into a
//! consecutive range for each replica.

use std::collections::BTreeMap;
use std::ops::Range;

use burn::tensor::{DType, Device, Tensor, TensorData};
use potstill_model::{
    Decoder, MapParameters, Parameter, ParameterName, TensorOperation, map_parameters,
    named_parameters,
};

use crate::collective::Collective;
use crate::error::Error;
use crate::gradient::{BatchGradient, LossSums};
use crate::gradients::Gradients;
use crate::optimizer::{Optimizer, Plain};
use crate::tensor_bytes::{decode_tensors, encode_tensors};
use crate::trainable::Trainable;

/// The row of all trained numbers, and the part of it that this replica updates.
pub(crate) struct Shard {
    rank: usize,
    parameters: BTreeMap<String, FlatParameter>,
    /// The range of each rank.
    ranges: Vec<Range<usize>>,
    /// Room for all trained numbers, and then for a number for each parameter.
    flat: Vec<f32>,
}

/// A parameter's place in the row.
struct FlatParameter {
    shape: Vec<usize>,
    range: Range<usize>,
    /// Number of the parameter.
    index: usize,
}

impl Shard {
    /// Divides what is trained of a model between `size` replicas.
    pub(crate) fn new(model: &Decoder, trained: &Trainable, rank: usize, size: usize) -> Self {
        let mut parameters = BTreeMap::new();
        let (mut numbers, mut ends) = (0, vec![0]);
        for (ParameterName { name, .. }, parameter) in named_parameters(model) {
            if !trained.contains(&name) {
                continue;
            }
            let shape = parameter.apply(Shape);
            let range = numbers..numbers + shape.iter().product::<usize>();
            numbers = range.end;
            ends.push(numbers);
            let index = parameters.len();
            let place = FlatParameter {
                shape,
                range,
                index,
            };
            parameters.insert(name, place);
        }
        let flat = vec![0.0; numbers + parameters.len()];
        Self {
            rank,
            parameters,
            ranges: balanced(&ends, size),
            flat,
        }
    }

    /// Number of replicas.
    pub(crate) fn size(&self) -> usize {
        self.ranges.len()
    }

    /// Whether this replica keeps the optimizer's state of the parameter with this name. Rank 0 has the masters of what is
    /// not trained.
    pub(crate) fn owns(&self, name: &str) -> bool {
        match self.parameters.get(name) {
            Some(place) => self.owns_range(&place.range),
            None => self.rank == 0,
        }
    }

    fn owns_range(&self, range: &Range<usize>) -> bool {
        let own = &self.ranges[self.rank];
        own.start <= range.start && range.end <= own.end
    }

    /// Adds up gradient and sums of all replicas. A parameter has a gradient if a replica has one of it.
    pub(crate) fn sum(
        &mut self,
        result: &mut BatchGradient,
        divergences: usize,
        device: &Device,
        collective: &mut dyn Collective,
    ) -> Result<(), Error> {
        let numbers = self.numbers();
        let mut gradients = std::mem::take(&mut result.gradients);
        self.flat.fill(0.0);
        for (name, place) in &self.parameters {
            if let Some(gradient) = gradients.remove(name) {
                copy_numbers(gradient, &mut self.flat[place.range.clone()])?;
                self.flat[numbers + place.index] = 1.0;
            }
        }
        drop(gradients);
        collective.sum(&mut self.flat)?;
        for (name, place) in &self.parameters {
            if self.flat[numbers + place.index] > 0.0 {
                let gradient = place.tensor(&self.flat, device);
                result.gradients.insert(name.clone(), gradient);
            }
        }
        sum_losses(&mut result.sums, divergences, collective)
    }

    /// Keeps the gradients of what this replica updates.
    pub(crate) fn own(&self, mut gradients: Gradients) -> Gradients {
        gradients.retain(|name, _| self.owns(name));
        gradients
    }

    /// Replaces the parameters that other replicas have updated.
    pub(crate) fn gather(
        &mut self,
        model: Decoder,
        collective: &mut dyn Collective,
    ) -> Result<Decoder, Error> {
        for (ParameterName { name, .. }, parameter) in named_parameters(&model) {
            if let Some(place) = self.parameters.get(&name)
                && self.owns_range(&place.range)
            {
                let range = place.range.clone();
                copy_numbers(parameter, &mut self.flat[range])?;
            }
        }
        let numbers = self.numbers();
        collective.gather(&mut self.flat[..numbers], &self.ranges)?;
        Ok(map_parameters(model, &mut Others(self)))
    }

    fn numbers(&self) -> usize {
        self.flat.len() - self.parameters.len()
    }
}

impl FlatParameter {
    fn data(&self, flat: &[f32]) -> TensorData {
        TensorData::new(flat[self.range.clone()].to_vec(), self.shape.clone())
    }

    fn tensor(&self, flat: &[f32], device: &Device) -> Parameter {
        let (data, options) = (self.data(flat), (device, DType::F32));
        match self.shape.len() {
            1 => Parameter::Vector(Tensor::from_data(data, options)),
            2 => Parameter::Matrix(Tensor::from_data(data, options)),
            _ => Parameter::Stack(Tensor::from_data(data, options)),
        }
    }
}

/// Brings the whole state of the optimizer to rank 0; `None` on the other ranks.
pub(crate) fn whole_optimizer(
    part: &Optimizer,
    device: &Device,
    collective: &mut dyn Collective,
) -> Result<Option<Optimizer>, Error> {
    let bytes = {
        let tensors = part.part().map_err(Error::Device)?;
        encode_tensors(&tensors).map_err(Error::Device)?
    };
    let parts = collective.gather_bytes(bytes)?;
    if collective.rank() > 0 {
        return Ok(None);
    }
    let mut whole = part.clone();
    for (rank, bytes) in parts.into_iter().enumerate().skip(1) {
        let damaged = |reason: String| Error::LostRank {
            rank,
            size: collective.size(),
            reason,
        };
        for (name, data) in decode_tensors(&bytes).map_err(damaged)? {
            whole.restore(&name, data, device).map_err(damaged)?;
        }
    }
    Ok(Some(whole))
}

/// Divides a row at ends of parameters into ranges of about the same length.
fn balanced(ends: &[usize], size: usize) -> Vec<Range<usize>> {
    let numbers = ends.last().copied().unwrap_or_default();
    let cut = |rank: usize| {
        let wanted = (numbers as u128 * rank as u128 / size as u128) as usize;
        let nearest = ends.iter().min_by_key(|end| end.abs_diff(wanted));
        nearest.copied().unwrap_or_default()
    };
    (0..size).map(|rank| cut(rank)..cut(rank + 1)).collect()
}

/// Adds up the sums of all replicas; `divergences` is the number of the objective's divergences.
fn sum_losses(
    sums: &mut LossSums,
    divergences: usize,
    collective: &mut dyn Collective,
) -> Result<(), Error> {
    sums.divergences.resize(divergences, 0.0);
    let fixed = [
        sums.rows as f64,
        sums.forward_kl,
        sums.cross_entropy,
        sums.loss,
    ];
    let mut all: Vec<f64> = fixed
        .into_iter()
        .chain(sums.divergences.drain(..))
        .collect();
    collective.sum_f64(&mut all)?;
    sums.divergences = all.split_off(fixed.len());
    [sums.forward_kl, sums.cross_entropy, sums.loss] = [all[1], all[2], all[3]];
    sums.rows = all[0] as usize;
    Ok(())
}

/// Copies the numbers of a tensor as f32.
fn copy_numbers(parameter: Parameter, to: &mut [f32]) -> Result<(), Error> {
    let data = parameter.apply(Plain).try_into_data();
    let data = data.map_err(|why| Error::Device(why.to_string()))?;
    match data.as_slice::<f32>() {
        Ok(numbers) => to.copy_from_slice(numbers),
        Err(_) => to
            .iter_mut()
            .zip(data.iter::<f32>())
            .for_each(|(to, number)| *to = number),
    }
    Ok(())
}

/// The shape of a tensor.
struct Shape;

impl TensorOperation for Shape {
    type Output = Vec<usize>;
    fn apply<const D: usize>(self, tensor: Tensor<D>) -> Vec<usize> {
        tensor.dims().to_vec()
    }
}

/// Puts the numbers of other replicas in place of their parameters.
struct Others<'a>(&'a Shard);

impl MapParameters for Others<'_> {
    fn map<const D: usize>(&mut self, parameter: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
        match self.0.parameters.get(&parameter.name) {
            Some(place) if !self.0.owns_range(&place.range) => {
                let plain = tensor.without_autodiff();
                let (device, dtype) = (plain.device(), plain.dtype());
                let data = place.data(&self.0.flat);
                // The numbers are those of the parameter's type, so the cast changes none.
                Tensor::<D>::from_data(data, (&device, DType::F32)).cast(dtype)
            }
            _ => tensor,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_parameter_has_one_owner_and_the_parts_are_balanced() {
        assert_eq!(balanced(&[0, 10, 20, 30, 40], 2), [0..20, 20..40]);
        assert_eq!(balanced(&[0, 100, 101, 102], 2), [0..100, 100..102]);
        assert_eq!(balanced(&[0, 5], 3), [0..0, 0..5, 5..5]);
        for size in 1..7 {
            let ends = [0, 3, 50, 51, 90, 170];
            let ranges = balanced(&ends, size);
            assert_eq!((ranges[0].start, ranges[size - 1].end), (0, 170));
            assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert!(ranges.iter().all(|range| ends.contains(&range.start)));
        }
    }
}
