//! A mixture of experts: a router chooses a few feed-forward blocks for each row.
//!
//! The choice is made on the host, and no gradient passes through it; the weights of the chosen experts are
//! differentiable. Among equal scores, the expert with the lower index is chosen. The rows of an expert are computed
//! together, and experts are added to a row in the order of their indices, so a row does not depend on the others.

use burn::module::{Module, Param};
use burn::tensor::activation::sigmoid;
use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor, TensorData};
use potstill_kernels::{GateActivation, gated, linear_biased};

use super::{GatedFeedForward, Linear, MapLayers, Shapes};
use crate::parameters::{Role, map_parameter};
use crate::plan::{ExpertsPlan, GatedPlan, GroupPlan, RouterPlan, Scoring};

/// A mixture of experts; see [`ExpertsPlan`].
#[derive(Module, Debug)]
pub(crate) struct Experts {
    router: Linear,
    /// Numbers that are added to the scores for the choice only, `[E]`.
    correction_bias: Option<Param<Tensor<1>>>,
    experts: ExpertBlocks,
    shared: Option<GatedFeedForward>,
    #[module(skip)]
    plan: ExpertsPlan,
}

/// The weights of all experts.
#[derive(Module, Debug)]
enum ExpertBlocks {
    Separate(Vec<GatedFeedForward>),
    Stacked(StackedExperts),
}

/// Experts whose weights are stacked and stored as `[in, out]`, with gate and up in alternating columns, as in gpt-oss.
#[derive(Module, Debug)]
struct StackedExperts {
    /// `[E, d, 2·w]`.
    gate_up: Param<Tensor<3>>,
    /// `[E, 2·w]`.
    gate_up_bias: Param<Tensor<2>>,
    /// `[E, w, d]`.
    down: Param<Tensor<3>>,
    /// `[E, d]`.
    down_bias: Param<Tensor<2>>,
    #[module(skip)]
    activation: GateActivation,
}

/// The rows that an expert computes: their indices among the n rows, and in the flattened `[n · k]` choices.
#[derive(Debug, Clone, Default, PartialEq)]
struct ExpertRows {
    rows: Vec<i32>,
    choices: Vec<i32>,
}

impl Experts {
    pub(crate) fn unset(plan: &ExpertsPlan, d: usize, shapes: &Shapes) -> Self {
        let (count, width) = (plan.count, plan.expert.width);
        Self {
            router: Linear::unset([count, d], plan.router.bias, shapes),
            correction_bias: (plan.router.correction_bias).then(|| shapes.zeros_f32([count])),
            experts: match plan.stacked {
                true => ExpertBlocks::Stacked(StackedExperts {
                    gate_up: shapes.zeros([count, d, 2 * width]),
                    gate_up_bias: shapes.zeros([count, 2 * width]),
                    down: shapes.zeros([count, width, d]),
                    down_bias: shapes.zeros([count, d]),
                    activation: plan.expert.activation,
                }),
                false => {
                    let expert = |_| GatedFeedForward::unset(plan.expert, d, shapes);
                    ExpertBlocks::Separate((0..count).map(expert).collect())
                }
            },
            shared: plan.shared_width.map(|width| {
                let shared = GatedPlan {
                    width,
                    ..plan.expert
                };
                GatedFeedForward::unset(shared, d, shapes)
            }),
            plan: plan.clone(),
        }
    }

    /// Computes the chosen experts of each row and adds them with their weights: `[n, d]` → `[n, d]`.
    pub(crate) fn forward(&self, x_nd: Tensor<2>) -> Tensor<2> {
        let ([n, _], k) = (x_nd.dims(), self.plan.chosen);
        let logits_ne = self.logits(x_nd.clone());
        let choice = self.choose(&logits_ne);
        let by_expert = rows_by_expert(&choice, k, self.plan.count);
        let choice_nk = TensorData::new(choice, [n, k]);
        let choice_nk = Tensor::<2, Int>::from_data(choice_nk, &x_nd.device());
        let weights_nk = self.plan.router.weights(logits_ne, choice_nk);
        let weights_c1 = weights_nk.cast(x_nd.dtype()).reshape([n * k, 1]);
        let mut sum_nd = x_nd.zeros_like();
        for (expert, ExpertRows { rows, choices }) in by_expert.into_iter().enumerate() {
            if rows.is_empty() {
                continue;
            }
            let index = |ids: Vec<i32>| {
                let data = TensorData::new(ids.clone(), [ids.len()]);
                Tensor::<1, Int>::from_data(data, &x_nd.device())
            };
            let rows = index(rows);
            let y_rd = self
                .experts
                .forward(expert, x_nd.clone().select(0, rows.clone()));
            let y_rd = y_rd * weights_c1.clone().select(0, index(choices));
            sum_nd = sum_nd.select_assign(0, rows, y_rd, IndexingUpdateOp::Add);
        }
        match &self.shared {
            Some(shared) => sum_nd + shared.forward(x_nd),
            None => sum_nd,
        }
    }

    /// Computes the router's logits in f32, or in f64 for models in f64.
    fn logits(&self, x_nd: Tensor<2>) -> Tensor<2> {
        let dtype = match x_nd.dtype() {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        let bias = self.router.bias.as_ref();
        let device = x_nd.device();
        linear_biased(
            x_nd.cast(dtype),
            self.router.weight.dense(dtype, &device).cast(dtype),
            bias.map(|bias| bias.val().cast(dtype)),
        )
    }

    /// Returns the experts of each row, `[n · k]`, best first.
    fn choose(&self, logits_ne: &Tensor<2>) -> Vec<i32> {
        let scores_ne = (self.plan.router).scores(logits_ne.clone().without_autodiff());
        let scores_ne = match &self.correction_bias {
            Some(bias_e) => {
                let bias_e = bias_e.val().without_autodiff().cast(scores_ne.dtype());
                scores_ne + bias_e.unsqueeze()
            }
            None => scores_ne,
        };
        let scores: Vec<f64> = scores_ne.into_data().iter::<f64>().collect();
        let rows = scores.chunks_exact(self.plan.count);
        rows.flat_map(|row| chosen(row, self.plan.chosen, self.plan.router.groups))
            .collect()
    }

    pub(crate) fn map_parameters(self, prefix: &str, mapper: &mut impl MapLayers) -> Self {
        let router = format!("{prefix}.{}", self.plan.router.name);
        let bias = self.correction_bias;
        Self {
            router: self.router.map_with_role(&router, Role::Router, mapper),
            correction_bias: bias.map(|bias| {
                let name = format!("{router}.e_score_correction_bias");
                map_parameter(mapper, name, Role::Correction, bias)
            }),
            experts: self
                .experts
                .map_parameters(&format!("{prefix}.experts"), mapper),
            shared: (self.shared)
                .map(|shared| shared.map_parameters(&format!("{prefix}.shared_experts"), mapper)),
            plan: self.plan,
        }
    }
}

impl RouterPlan {
    /// Computes the scores by which experts are chosen: `[n, E]` → `[n, E]`.
    fn scores(&self, logits_ne: Tensor<2>) -> Tensor<2> {
        match self.scoring {
            Scoring::Softmax => softmax(logits_ne),
            Scoring::Sigmoid => sigmoid(logits_ne),
            Scoring::SoftmaxOfChosen => logits_ne,
        }
    }

    /// Computes the weights of the chosen experts, `[n, k]`; differentiable in the logits.
    fn weights(&self, logits_ne: Tensor<2>, choice_nk: Tensor<2, Int>) -> Tensor<2> {
        let scores_nk = self.scores(logits_ne).gather(1, choice_nk);
        let weights_nk = match (self.scoring, self.normalised) {
            (Scoring::SoftmaxOfChosen, _) => softmax(scores_nk),
            (_, true) => scores_nk.clone() / (scores_nk.sum_dim(1) + 1e-20),
            (_, false) => scores_nk,
        };
        match self.scale == 1.0 {
            true => weights_nk,
            false => weights_nk * self.scale,
        }
    }
}

/// Computes the softmax of each row, `[n, E]`. burn's own rounds differently with autodiff and without, and a layer that is
/// computed again has to choose the same experts.
fn softmax(logits_ne: Tensor<2>) -> Tensor<2> {
    let largest_n1 = logits_ne.clone().detach().max_dim(1);
    let powers_ne = (logits_ne - largest_n1).exp();
    powers_ne.clone() / powers_ne.sum_dim(1)
}

/// Returns the indices of the k largest scores, best first, of the open groups only.
fn chosen(scores: &[f64], k: usize, groups: Option<GroupPlan>) -> Vec<i32> {
    let mut open = vec![true; scores.len()];
    if let Some(plan) = groups {
        let size = scores.len() / plan.count;
        let group_score = |group: &[f64]| -> f64 {
            let best = largest(group, plan.summed);
            best.into_iter().map(|index| group[index]).sum()
        };
        let of_groups: Vec<f64> = scores.chunks_exact(size).map(group_score).collect();
        let open_groups = largest(&of_groups, plan.chosen);
        for (index, open) in open.iter_mut().enumerate() {
            *open = open_groups.contains(&(index / size));
        }
    }
    let scores: Vec<f64> = (scores.iter().zip(open))
        .map(|(score, open)| if open { *score } else { f64::NEG_INFINITY })
        .collect();
    largest(&scores, k)
        .into_iter()
        .map(|index| index as i32)
        .collect()
}

/// Returns the indices of the k largest values, largest first, the lower index first among equals.
fn largest(values: &[f64], k: usize) -> Vec<usize> {
    let mut indices: Vec<usize> = (0..values.len()).collect();
    // The sort is stable, and NaN is ordered like infinity.
    indices.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    indices.truncate(k);
    indices
}

fn rows_by_expert(choice: &[i32], k: usize, experts: usize) -> Vec<ExpertRows> {
    let mut by_expert = vec![ExpertRows::default(); experts];
    for (index, &expert) in choice.iter().enumerate() {
        let expert = &mut by_expert[expert as usize];
        expert.rows.push((index / k) as i32);
        expert.choices.push(index as i32);
    }
    by_expert
}

impl ExpertBlocks {
    fn forward(&self, expert: usize, x_nd: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Separate(experts) => experts[expert].forward(x_nd),
            Self::Stacked(experts) => experts.forward(expert, x_nd),
        }
    }

    fn map_parameters(self, prefix: &str, mapper: &mut impl MapLayers) -> Self {
        let projection = Role::Projection;
        match self {
            Self::Separate(experts) => {
                let experts = experts.into_iter().enumerate();
                let map = experts.map(|(index, expert)| {
                    expert.map_parameters(&format!("{prefix}.{index}"), mapper)
                });
                Self::Separate(map.collect())
            }
            Self::Stacked(experts) => Self::Stacked(StackedExperts {
                gate_up: map_parameter(
                    mapper,
                    format!("{prefix}.gate_up_proj"),
                    projection,
                    experts.gate_up,
                ),
                gate_up_bias: map_parameter(
                    mapper,
                    format!("{prefix}.gate_up_proj_bias"),
                    Role::Bias,
                    experts.gate_up_bias,
                ),
                down: map_parameter(
                    mapper,
                    format!("{prefix}.down_proj"),
                    projection,
                    experts.down,
                ),
                down_bias: map_parameter(
                    mapper,
                    format!("{prefix}.down_proj_bias"),
                    Role::Bias,
                    experts.down_bias,
                ),
                activation: experts.activation,
            }),
        }
    }
}

impl StackedExperts {
    fn forward(&self, expert: usize, x_nd: Tensor<2>) -> Tensor<2> {
        let ([n, _], [_, _, both]) = (x_nd.dims(), self.gate_up.val().dims());
        let weight = |stack: &Param<Tensor<3>>| {
            let expert = stack.val().narrow(0, expert, 1).squeeze_dim::<2>(0);
            expert.transpose()
        };
        let bias =
            |biases: &Param<Tensor<2>>| Some(biases.val().narrow(0, expert, 1).squeeze_dim::<1>(0));
        let gate_up = linear_biased(x_nd, weight(&self.gate_up), bias(&self.gate_up_bias));
        let pairs = gate_up.reshape([n, both / 2, 2]);
        let [gate_nw, up_nw] =
            [0, 1].map(|column| pairs.clone().narrow(2, column, 1).reshape([n, both / 2]));
        let inner_nw = gated(gate_nw, up_nw, self.activation);
        linear_biased(inner_nw, weight(&self.down), bias(&self.down_bias))
    }
}
