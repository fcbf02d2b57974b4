//! Hidden states: the student's, projected where widths differ, should be the teacher's.
//!
//! ```text
//! MSE      (1/d) Σ_i (a_i − b_i)²            ∂/∂a = (2/d) (a − b)
//! cosine   1 − ⟨a, b⟩ / (‖a‖ ‖b‖)            ∂/∂a = (cos · a/‖a‖ − b/‖b‖) / ‖a‖
//! ```
//!
//! a is the student's state after [`Projection`], b the teacher's; symmetric in value. Reduction: none
//! over rows; the MSE is the mean over the width, so that a layer's weight does not depend on it.
//! Source: MSE through a learned map, TinyBERT (Jiao et al. 2020, §3.1, eq. 8), there without bias as
//! here; cosine, DistilBERT (Sanh et al. 2019, §2), there on the last states.
//!
//! Special cases: a state of zeros has no direction, so its cosine distance is 1 and its gradient 0.
//! f16 and bf16 states are compared in f32. Rows are positions of the same tokens: teacher and student
//! need one tokenizer. Time and memory: n·d.

use burn::tensor::{Bool, DType, Device, Tensor, TensorData};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::wide;

/// Mean squared difference by row, `[n]`, of states [n, d].
#[must_use]
pub fn hidden_mse(student_nd: Tensor<2>, teacher_nd: Tensor<2>) -> Tensor<1> {
    let [student_nd, teacher_nd] = wide([student_nd, teacher_nd]);
    square(student_nd - teacher_nd)
        .mean_dim(1)
        .squeeze_dim::<1>(1)
}

/// Cosine distance by row, `[n]`, between 0 and 2, of states [n, d].
#[must_use]
pub fn hidden_cosine(student_nd: Tensor<2>, teacher_nd: Tensor<2>) -> Tensor<1> {
    let [student_nd, teacher_nd] = wide([student_nd, teacher_nd]);
    let (student_nd, no_student_n1) = unit(student_nd);
    let (teacher_nd, no_teacher_n1) = unit(teacher_nd);
    // ½‖a − b‖² of unit vectors is 1 − cos, and keeps its digits where the two are close.
    let distance_n1 = square(student_nd - teacher_nd).sum_dim(1) * 0.5;
    distance_n1
        .mask_fill(no_student_n1.bool_or(no_teacher_n1), 1.0)
        .squeeze_dim::<1>(1)
}

fn square(x_nd: Tensor<2>) -> Tensor<2> {
    x_nd.clone() * x_nd
}

/// x / ‖x‖, and the rows that are zero.
fn unit(x_nd: Tensor<2>) -> (Tensor<2>, Tensor<2, Bool>) {
    // A direction does not change with the scale, so the largest entry is taken out as a constant:
    // squares neither overflow nor vanish.
    let largest_n1 = x_nd.clone().detach().abs().max_dim(1);
    let zero_n1 = largest_n1.clone().equal_elem(0.0);
    let x_nd = x_nd / largest_n1.mask_fill(zero_n1.clone(), 1.0);
    let norm_n1 = square(x_nd.clone())
        .sum_dim(1)
        .mask_fill(zero_n1.clone(), 1.0)
        .sqrt();
    (x_nd / norm_n1, zero_n1)
}

/// A learned linear map from the student's width to the teacher's. It is a parameter of the training
/// alone: give it the learning rate of the student and leave it out of what is saved.
#[derive(Debug, Clone)]
pub struct Projection {
    /// [d_t, d_s], as checkpoints write linear layers.
    pub weight: Tensor<2>,
}

impl Projection {
    /// Entries independent and uniform in ±√(3/d_s), so of variance 1/d_s: states keep their mean
    /// square. The same for a seed on every device.
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

    /// States [n, d_s] → [n, d_t]; differentiable in both.
    #[must_use]
    pub fn apply(&self, student_nd: Tensor<2>) -> Tensor<2> {
        potstill_kernels::linear(student_nd, self.weight.clone())
    }
}

/// Which hidden states are compared: pairs (student, teacher), where 0 is the embeddings' output and m
/// what comes out of the m-th layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerMap(Vec<(usize, usize)>);

/// A layer map that does not fit the two models.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayerMapError {
    /// A hidden state that a model does not have.
    #[error(
        "the layer map has ({student}, {teacher}), and the {model} has {layers} layers: use 0 (the embeddings) to {layers}"
    )]
    NoSuchLayer {
        /// The pair's student side.
        student: usize,
        /// The pair's teacher side.
        teacher: usize,
        /// Which model lacks it.
        model: &'static str,
        /// How many layers that model has.
        layers: usize,
    },
    /// Nothing to compare.
    #[error("the layer map has no pair: name at least one (student, teacher)")]
    Empty,
    /// A model without layers.
    #[error("the {model} has no layers, so none can be compared")]
    NoLayers {
        /// Which model.
        model: &'static str,
    },
}

impl LayerMap {
    /// These pairs (student, teacher), for models of so many layers. The last states alone, as in
    /// DistilBERT's cosine loss and MiniLM, are `[(student_layers, teacher_layers)]`.
    ///
    /// # Errors
    /// No pair, or one that a model does not have.
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

    /// Every state of the student, evenly spread over the teacher: m ↦ m·teacher/student, rounded,
    /// halves up. 0 goes to 0 and the last to the last; 4 layers over 12 give TinyBERT's m ↦ 3m (§3.1
    /// there). A student deeper than its teacher meets some layers twice.
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

    /// The pairs (student, teacher), in the order they were given.
    #[must_use]
    pub fn pairs(&self) -> &[(usize, usize)] {
        &self.0
    }
}
