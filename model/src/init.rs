//! Random initialisation of a model's weights.

use burn::tensor::{DType, Device, Tensor, TensorData};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::dtype::check_model_dtype;
use crate::parameters::{MapParameters, map_parameters};
use crate::{Config, Decoder, Error};

impl Decoder {
    /// Makes a model with random weights: matrices from a normal distribution with mean 0 and standard deviation 0.02,
    /// norm gains 1. The same seed gives the same weights on every device.
    ///
    /// # Errors
    /// Returns [`Error::FloatType`] for a type that models do not run in.
    pub fn init(config: &Config, seed: u64, dtype: DType, device: &Device) -> Result<Self, Error> {
        check_model_dtype(dtype)?;
        let mut random = RandomWeights {
            seed,
            stream: 0,
            dtype,
        };
        Ok(map_parameters(
            Self::unset(config, dtype, device),
            &mut random,
        ))
    }
}

/// Fills parameters in order; each matrix draws from its own ChaCha stream.
struct RandomWeights {
    seed: u64,
    stream: u64,
    dtype: DType,
}

impl MapParameters for RandomWeights {
    fn matrix(&mut self, _: &str, unset: Tensor<2>) -> Tensor<2> {
        let mut generator = ChaCha8Rng::seed_from_u64(self.seed);
        generator.set_stream(self.stream);
        self.stream += 1;
        let shape = unset.dims();
        let values: Vec<f64> = (0..shape[0] * shape[1])
            .map(|_| 0.02 * standard_normal(&mut generator))
            .collect();
        let data = TensorData::new(values, shape);
        Tensor::from_data(data, (&unset.device(), self.dtype))
    }

    fn vector(&mut self, _: &str, unset: Tensor<1>) -> Tensor<1> {
        unset.ones_like()
    }
}

/// Draws from the standard normal distribution (Box and Muller 1958, the cosine branch).
fn standard_normal(generator: &mut ChaCha8Rng) -> f64 {
    let radius = (-2.0 * (1.0 - generator.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * generator.random::<f64>()).cos()
}
