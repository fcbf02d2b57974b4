//! Random initialisation of a model's weights.

use burn::tensor::{DType, Device, Tensor, TensorData};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::device::check_device_dtype;
use crate::dtype::check_model_dtype;
use crate::named_parameters::map_parameters;
use crate::parameters::{MapParameters, ParameterName, Role};
use crate::{Config, Decoder, Error};

impl Decoder {
    /// Makes a model with random weights: matrices from a normal distribution with mean 0 and standard deviation 0.02,
    /// norm gains 1, biases 0. The same seed gives the same weights on every device.
    ///
    /// # Errors
    /// Returns [`Error::FloatType`] for a type that models do not run in, and [`Error::DeviceType`] for one that the
    /// device does not compute in.
    pub fn init(config: &Config, seed: u64, dtype: DType, device: &Device) -> Result<Self, Error> {
        check_model_dtype(dtype)?;
        check_device_dtype(device, dtype)?;
        let mut random = RandomWeights {
            seed,
            stream: 0,
            gain_offset: config.plan.norm.gain_offset,
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
    gain_offset: f64,
}

impl MapParameters for RandomWeights {
    fn map<const D: usize>(&mut self, parameter: &ParameterName, unset: Tensor<D>) -> Tensor<D> {
        match parameter.role {
            // A gain that is stored as its difference from 1 starts at 0.
            Role::Norm if self.gain_offset == 1.0 => unset.zeros_like(),
            Role::Norm => unset.ones_like(),
            Role::Bias | Role::Correction => unset.zeros_like(),
            Role::Router if D == 1 => unset.zeros_like(),
            Role::Embedding | Role::Head | Role::Projection | Role::Router => self.matrix(unset),
            // A model that is made has no adapters.
            Role::Adapter => unset,
        }
    }
}

impl RandomWeights {
    fn matrix<const D: usize>(&mut self, unset: Tensor<D>) -> Tensor<D> {
        let mut generator = ChaCha8Rng::seed_from_u64(self.seed);
        generator.set_stream(self.stream);
        self.stream += 1;
        let (shape, dtype) = (unset.dims(), unset.dtype());
        let values: Vec<f64> = (0..shape.iter().product())
            .map(|_| 0.02 * standard_normal(&mut generator))
            .collect();
        let data = TensorData::new(values, shape);
        Tensor::from_data(data, (&unset.device(), dtype))
    }
}

/// Draws from the standard normal distribution (Box and Muller 1958, the cosine branch).
fn standard_normal(generator: &mut ChaCha8Rng) -> f64 {
    let radius = (-2.0 * (1.0 - generator.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * generator.random::<f64>()).cos()
}
