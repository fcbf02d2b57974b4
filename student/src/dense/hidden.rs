//! Losses on hidden states: the student's states, projected if the widths differ, should equal the teacher's.
//!
//! ```text
//! MSE      (1/d) Σ_i (a_i − b_i)²            ∂/∂a = (2/d) (a − b)
//! cosine   1 − ⟨a, b⟩ / (‖a‖ ‖b‖)            ∂/∂a = (cos · a/‖a‖ − b/‖b‖) / ‖a‖
//! ```
//!
//! a is the student's state after [`Projection`], b the teacher's; symmetric in value. Reduction: none
//! over rows. The MSE is the mean over the width, so that the weight of a layer does not depend on the width.
//! Source: MSE through a learned map, TinyBERT (Jiao et al. 2020, §3.1, eq. 8), without bias, as
//! here; cosine from DistilBERT (Sanh et al. 2019, §2), on the last states.
//!
//! Special cases: a state of zeros has no direction, so its cosine distance is 1 and its gradient 0.
//! f16 and bf16 states are compared in f32. Rows are positions of the same tokens, so teacher and student
//! need the same tokenizer. Time and memory: n·d.

use burn::tensor::{Bool, DType, Device, Tensor, TensorData};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::wide;

/// Computes the mean squared difference of each row, `[n]`, of states [n, d].
#[must_use]
pub fn hidden_mse(student_nd: Tensor<2>, teacher_nd: Tensor<2>) -> Tensor<1> {
    let [student_nd, teacher_nd] = wide([student_nd, teacher_nd]);
    square(student_nd - teacher_nd)
        .mean_dim(1)
        .squeeze_dim::<1>(1)
}

/// Computes the cosine distance of each row, `[n]`, between 0 and 2, of states [n, d].
#[must_use]
pub fn hidden_cosine(student_nd: Tensor<2>, teacher_nd: Tensor<2>) -> Tensor<1> {
    let [student_nd, teacher_nd] = wide([student_nd, teacher_nd]);
    let (student_nd, zero_student_n1) = unit(student_nd);
    let (teacher_nd, zero_teacher_n1) = unit(teacher_nd);
    // ½‖a − b‖² of unit vectors is 1 − cos, and loses no digits if the two are close.
    let distance_n1 = square(student_nd - teacher_nd).sum_dim(1) * 0.5;
    distance_n1
        .mask_fill(zero_student_n1.bool_or(zero_teacher_n1), 1.0)
        .squeeze_dim::<1>(1)
}

fn square(x_nd: Tensor<2>) -> Tensor<2> {
    x_nd.clone() * x_nd
}

/// Computes x / ‖x‖, and which rows are zero.
fn unit(x_nd: Tensor<2>) -> (Tensor<2>, Tensor<2, Bool>) {
    // Scaling does not change a direction, so dividing by the largest entry, as a constant, is allowed; then
    // squares neither overflow nor underflow.
    let largest_n1 = x_nd.clone().detach().abs().max_dim(1);
    let zero_n1 = largest_n1.clone().equal_elem(0.0);
    let x_nd = x_nd / largest_n1.mask_fill(zero_n1.clone(), 1.0);
    let norm_n1 = square(x_nd.clone())
        .sum_dim(1)
        .mask_fill(zero_n1.clone(), 1.0)
        .sqrt();
    (x_nd / norm_n1, zero_n1)
}

/// A learned linear map from the student's width to the teacher's. The map exists only during training: train
/// it with the learning rate of the student, and do not save it with the model.
#[derive(Debug, Clone)]
pub struct Projection {
    /// Weight, [d_t, d_s], as in the linear layers of checkpoints.
    pub weight: Tensor<2>,
}

impl Projection {
    /// Creates a map with independent entries, uniform in ±√(3/d_s), so with variance 1/d_s, which preserves the
    /// mean square of states. The entries depend on the seed and not on the device.
    #[must_use]
    pub fn init(
        teacher_width: usize,
        student_width: usize,
        seed: u64,
        dtype: DType,
        device: &Device,
    ) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let bound = (3.0 / student_width as f64).sqrt();
        let entries: Vec<f64> = (0..teacher_width * student_width)
            .map(|_| rng.random_range(-bound..bound))
            .collect();
        let data = TensorData::new(entries, [teacher_width, student_width]);
        Self {
            weight: Tensor::from_data(data, (device, dtype)),
        }
    }

    /// Maps states [n, d_s] → [n, d_t]; differentiable in the states and the weight.
    #[must_use]
    pub fn apply(&self, student_nd: Tensor<2>) -> Tensor<2> {
        potstill_kernels::linear(student_nd, self.weight.clone())
    }
}

/// Pairs (student, teacher) of hidden states that are compared: 0 is the output of the embeddings, m the output of
/// the m-th layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerMap(Vec<(usize, usize)>);

/// Error for a layer map that does not match the two models.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayerMapError {
    /// A pair names a hidden state that a model does not have.
    #[error(
        "the layer map has ({student}, {teacher}), and the {model} has {layers} layers\n\
         hint: use 0 (the embeddings) to {layers}"
    )]
    NoSuchLayer {
        /// Layer of the student.
        student: usize,
        /// Layer of the teacher.
        teacher: usize,
        /// Model without this layer: student or teacher.
        model: &'static str,
        /// Number of layers of that model.
        layers: usize,
    },
    /// The map has no pair.
    #[error("the layer map has no pair\nhint: name at least one pair (student, teacher)")]
    Empty,
    /// A model has no layers.
    #[error("the {model} has no layers to compare")]
    NoLayers {
        /// Model without layers: student or teacher.
        model: &'static str,
    },
}

impl LayerMap {
    /// Creates a map of these pairs (student, teacher), for models with these numbers of layers. The map of only the
    /// last states, as in DistilBERT's cosine loss and MiniLM, is `[(student_layers, teacher_layers)]`.
    ///
    /// # Errors
    /// No pair, or a layer that a model does not have.
    pub fn new(
        pairs: Vec<(usize, usize)>,
        student_layers: usize,
        teacher_layers: usize,
    ) -> Result<Self, LayerMapError> {
        if pairs.is_empty() {
            return Err(LayerMapError::Empty);
        }
        for &(student, teacher) in &pairs {
            for (model, layer, layers) in [
                ("student", student, student_layers),
                ("teacher", teacher, teacher_layers),
            ] {
                if layer > layers {
                    return Err(LayerMapError::NoSuchLayer {
                        student,
                        teacher,
                        model,
                        layers,
                    });
                }
            }
        }
        Ok(Self(pairs))
    }

    /// Creates a map of every state of the student, spread evenly over the teacher's: m ↦ m·teacher/student,
    /// rounded, halves up. The first maps to the first and the last to the last; 4 layers over 12 give TinyBERT's
    /// m ↦ 3m (§3.1 there). If the student is deeper than its teacher, some of the teacher's layers occur twice.
    ///
    /// # Errors
    /// A model without layers.
    pub fn uniform(student_layers: usize, teacher_layers: usize) -> Result<Self, LayerMapError> {
        for (model, layers) in [("student", student_layers), ("teacher", teacher_layers)] {
            if layers == 0 {
                return Err(LayerMapError::NoLayers { model });
            }
        }
        let teacher = |m: usize| (2 * m * teacher_layers + student_layers) / (2 * student_layers);
        Ok(Self(
            (0..=student_layers).map(|m| (m, teacher(m))).collect(),
        ))
    }

    /// The pairs (student, teacher), in the order given.
    #[must_use]
    pub fn pairs(&self) -> &[(usize, usize)] {
        &self.0
    }
}
