//! Losses on ranking, on hidden states and on distances by rank, compared with plain loops.

use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Device, Tensor};
use potstill_student::dense::{
    LayerMap, LayerMapError, Margin, Projection, at_teacher_top, hidden_cosine, hidden_mse,
    hinge_ranking, logistic_ranking, universal_logit, universal_logit_sparse,
};

use crate::plain::{
    Rows, check, constant, log_softmaxes, near, numbers, random, tensor, value_and_gradient,
};

const EMPTY: f64 = -1.0e4;

/// Creates the teacher's constant in the dtype of the student's tensor.
fn like(teacher: &Rows, student: &Tensor<2>) -> Tensor<2> {
    tensor(teacher, student.dtype(), &student.device())
}

fn ranking(
    log_p: &Rows,
    log_q: &Rows,
    pair: impl Fn(&[f64], &[f64], usize, usize) -> f64,
) -> Vec<f64> {
    let row = |(p, q): (&Vec<f64>, &Vec<f64>)| {
        let (mut sum, mut pairs) = (0.0, 0);
        for i in 0..p.len() {
            for j in 0..p.len() {
                if p[i] > p[j] && p[j] > EMPTY {
                    sum += pair(p, q, i, j);
                    pairs += 1;
                }
            }
        }
        if pairs == 0 { 0.0 } else { sum / pairs as f64 }
    };
    log_p.iter().zip(log_q).map(row).collect()
}

fn hinge(p: &[f64], q: &[f64], i: usize, j: usize, margin: Option<f64>) -> f64 {
    let margin = margin.unwrap_or(p[i].exp() - p[j].exp());
    (margin - (q[i].exp() - q[j].exp())).max(0.0)
}

fn logistic(_: &[f64], q: &[f64], i: usize, j: usize) -> f64 {
    (q[j] - q[i]).exp().ln_1p()
}

/// Returns rows with ties, with empty slots, with a single token, and without tokens.
fn teacher() -> Rows {
    let mut log_p = log_softmaxes(&random(6, 7, 3.0, 1));
    log_p[1][2] = log_p[1][5];
    log_p[2][4..].fill(EMPTY);
    log_p[3][1..].fill(EMPTY);
    log_p[4].fill(EMPTY);
    log_p[5].fill(-2.0);
    log_p
}

#[test]
fn rankings_are_the_mean_over_the_pairs_that_the_teacher_orders() {
    let (log_p, log_q) = (teacher(), log_softmaxes(&random(6, 7, 3.0, 2)));
    for (margin, number) in [(Margin::Constant(0.3), Some(0.3)), (Margin::Teacher, None)] {
        check(
            "hinge",
            &log_q,
            |q| hinge_ranking(like(&log_p, &q), q, margin),
            |q| ranking(&log_p, q, |p, q, i, j| hinge(p, q, i, j, number)),
        );
    }
    check(
        "logistic",
        &log_q,
        |q| logistic_ranking(like(&log_p, &q), q),
        |q| ranking(&log_p, q, logistic),
    );
    // Rows without a pair.
    let value = numbers(logistic_ranking(constant(&log_p), constant(&log_q)));
    assert_eq!(value[3..], [0.0; 3]);
}

#[test]
fn one_token_has_no_pair_and_a_student_equal_to_the_teacher_has_no_hinge_loss() {
    let one = random(3, 1, 2.0, 3);
    let (value, gradient) = value_and_gradient(&one, DType::F64, &|q| {
        hinge_ranking(like(&one, &q), q.clone(), Margin::Constant(1.0))
            + logistic_ranking(like(&one, &q), q)
    });
    assert_eq!((value, gradient), (vec![0.0; 3], vec![0.0; 3]));

    let log_p = teacher();
    let value = hinge_ranking(constant(&log_p), constant(&log_p), Margin::Teacher);
    assert_eq!(numbers(value), [0.0; 6]);
}

/// The rankings from dense logits of a larger vocabulary, with one logit of −∞.
#[test]
fn rankings_of_the_teachers_top() {
    let (teacher, student) = (random(4, 11, 4.0, 4), random(4, 13, 4.0, 5));
    let top = |k: usize, row: &[f64]| {
        let mut ids: Vec<usize> = (0..row.len()).collect();
        ids.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        ids.truncate(k);
        ids
    };
    let columns = |rows: &Rows, k: usize| -> Rows {
        let picked = log_softmaxes(rows).into_iter().zip(&teacher);
        picked
            .map(|(row, by)| top(k, by).iter().map(|&id| row[id]).collect())
            .collect()
    };
    for k in [1, 5, 64] {
        check(
            "logistic of the top",
            &student,
            |z| {
                let [log_p, log_q] = at_teacher_top(like(&teacher, &z), z, k);
                logistic_ranking(log_p, log_q)
            },
            |z| ranking(&columns(&teacher, k), &columns(z, k), logistic),
        );
    }
    let mut student = student;
    let best = top(1, &teacher[0])[0];
    student[0][best] = f64::NEG_INFINITY;
    let (value, gradient) = value_and_gradient(&student, DType::F32, &|z| {
        let [log_p, log_q] = at_teacher_top(like(&teacher, &z), z, 5);
        logistic_ranking(log_p, log_q)
    });
    assert!(value.iter().chain(&gradient).all(|x| x.is_finite()));
    assert!(value[0] > 1e3 && gradient[best] == 0.0);
}

fn mse(a: &Rows, b: &Rows) -> Vec<f64> {
    let row = |(a, b): (&Vec<f64>, &Vec<f64>)| {
        a.iter().zip(b).map(|(x, y)| (x - y).powi(2)).sum::<f64>() / a.len() as f64
    };
    a.iter().zip(b).map(row).collect()
}

fn cosine(a: &Rows, b: &Rows) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let row = |(a, b): (&Vec<f64>, &Vec<f64>)| 1.0 - dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
    a.iter().zip(b).map(row).collect()
}

#[test]
fn hidden_states_against_loops() {
    let (student, teacher) = (random(5, 6, 2.0, 6), random(5, 6, 2.0, 7));
    check(
        "mse",
        &student,
        |x| hidden_mse(x.clone(), like(&teacher, &x)),
        |x| mse(x, &teacher),
    );
    check(
        "cosine",
        &student,
        |x| hidden_cosine(x.clone(), like(&teacher, &x)),
        |x| cosine(x, &teacher),
    );
    for loss in [hidden_mse, hidden_cosine] {
        let (value, gradient) = value_and_gradient(&student, DType::F32, &|x| {
            loss(x.clone(), like(&student, &x))
        });
        assert_eq!((value, gradient), (vec![0.0; 5], vec![0.0; 30]));
    }
}

#[test]
fn cosine_of_zero_states_and_at_every_scale() {
    let mut student = random(4, 6, 2.0, 8);
    let mut teacher = random(4, 6, 2.0, 9);
    let expected = cosine(&student, &teacher);
    student[0].fill(0.0);
    teacher[1].fill(0.0);
    // The squares of these numbers overflow or underflow in f32.
    student[2].iter_mut().for_each(|x| *x *= 1e25);
    student[3].iter_mut().for_each(|x| *x *= 1e-25);
    let (value, gradient) = value_and_gradient(&student, DType::F32, &|x| {
        hidden_cosine(x.clone(), like(&teacher, &x))
    });
    near(
        "cosine",
        &value,
        &[1.0, 1.0, expected[2], expected[3]],
        1e-6,
    );
    assert!(gradient.iter().all(|g| g.is_finite()));
    assert_eq!(gradient[..12], [0.0; 12]);
    assert!(gradient[18..].iter().any(|&g| g.abs() > 1e20));
}

#[test]
fn half_precision_states_are_compared_in_f32() {
    let (student, teacher) = (random(3, 8, 2.0, 10), random(3, 8, 2.0, 11));
    let device = Device::flex();
    let half = |rows: &Rows| tensor(rows, DType::BF16, &device);
    let value = hidden_cosine(half(&student), half(&teacher));
    assert_eq!(value.dtype(), DType::F32);
    near("bf16", &numbers(value), &cosine(&student, &teacher), 0.02);
    let [log_p, log_q] = at_teacher_top(half(&teacher), half(&student), 3);
    assert_eq!([log_p.dtype(), log_q.dtype()], [DType::F32; 2]);
}

/// The projection to the teacher's width has gradients for the state and for its weight.
#[test]
fn a_projection_is_learned() {
    let (student, teacher) = (random(5, 4, 2.0, 12), random(5, 3, 2.0, 13));
    let init = |dtype| Projection::init(3, 4, 7, dtype, &Device::flex());
    let weight: Rows = numbers(init(DType::F64).weight)
        .chunks(4)
        .map(<[f64]>::to_vec)
        .collect();
    let mapped = |states: &Rows, weight: &Rows| -> Rows {
        let map = |x: &Vec<f64>| {
            let entry = |w: &Vec<f64>| w.iter().zip(x).map(|(w, x)| w * x).sum();
            weight.iter().map(entry).collect()
        };
        states.iter().map(map).collect()
    };
    check(
        "projected state",
        &student,
        |x| {
            let weight = like(&weight, &x);
            hidden_mse(Projection { weight }.apply(x.clone()), like(&teacher, &x))
        },
        |x| mse(&mapped(x, &weight), &teacher),
    );
    check(
        "map",
        &weight,
        |weight| {
            let states = like(&student, &weight);
            let teacher = like(&teacher, &weight);
            hidden_mse(Projection { weight }.apply(states), teacher)
        },
        |weight| mse(&mapped(&student, weight), &teacher),
    );

    let large = Projection::init(300, 200, 1, DType::F32, &Device::flex()).weight;
    assert_eq!(large.dims(), [300, 200]);
    let entries = numbers(large.clone());
    let variance = entries.iter().map(|x| x * x).sum::<f64>() / entries.len() as f64;
    assert!((variance * 200.0 - 1.0).abs() < 0.02, "{variance}");
    let again =
        |seed| numbers(Projection::init(300, 200, seed, DType::F32, &Device::flex()).weight);
    assert!(again(1) == entries && again(2) != entries);
}

#[test]
fn layer_maps() {
    let pairs = |student, teacher| {
        LayerMap::uniform(student, teacher)
            .unwrap()
            .pairs()
            .to_vec()
    };
    assert_eq!(pairs(4, 12), [(0, 0), (1, 3), (2, 6), (3, 9), (4, 12)]);
    assert_eq!(pairs(3, 4), [(0, 0), (1, 1), (2, 3), (3, 4)]);
    assert_eq!(pairs(2, 2), [(0, 0), (1, 1), (2, 2)]);
    assert_eq!(pairs(4, 2), [(0, 0), (1, 1), (2, 1), (3, 2), (4, 2)]);
    let last = LayerMap::new(vec![(6, 12)], 6, 12).unwrap();
    assert_eq!(last.pairs(), [(6, 12)]);

    let message = |map: Result<LayerMap, LayerMapError>| map.unwrap_err().to_string();
    assert_eq!(
        message(LayerMap::new(vec![(1, 2), (3, 13)], 6, 12)),
        "the layer map has (3, 13), and the teacher has 12 layers\nhint: use 0 (the embeddings) to 12"
    );
    assert_eq!(
        message(LayerMap::new(vec![(7, 1)], 6, 12)),
        "the layer map has (7, 1), and the student has 6 layers\nhint: use 0 (the embeddings) to 6"
    );
    assert!(message(LayerMap::new(Vec::new(), 6, 12)).contains("no pair"));
    assert!(message(LayerMap::uniform(6, 0)).contains("the teacher has no layers"));
}

fn sorted(row: &[f64]) -> Vec<f64> {
    let mut p: Vec<f64> = row.iter().map(|x| x.exp()).collect();
    p.sort_by(|a, b| b.total_cmp(a));
    p
}

fn by_rank(log_p: &Rows, log_q: &Rows) -> Vec<f64> {
    let row = |(p, q): (&Vec<f64>, &Vec<f64>)| {
        let (p, q) = (sorted(p), sorted(q));
        let at = |x: &[f64], i: usize| x.get(i).copied().unwrap_or(0.0);
        let ranks = 0..p.len().max(q.len());
        ranks.map(|i| (at(&p, i) - at(&q, i)).abs()).sum()
    };
    log_p.iter().zip(log_q).map(row).collect()
}

#[test]
fn universal_logit_is_the_distance_of_sorted_probabilities() {
    for (teacher_v, student_v) in [(9, 5), (5, 9), (6, 6), (1, 4)] {
        let log_p = log_softmaxes(&random(4, teacher_v, 3.0, 14));
        let student = random(4, student_v, 3.0, 15);
        check(
            "universal logit",
            &student,
            |z| universal_logit(like(&log_p, &z), log_softmax(z, 1)),
            |z| by_rank(&log_p, &log_softmaxes(z)),
        );
    }
    // The same probabilities at other tokens, and ties on both sides.
    let log_p = log_softmaxes(&vec![vec![0.0, 1.0, 2.0, 2.0], vec![0.5; 4]]);
    let log_q: Rows = log_p
        .iter()
        .map(|row| row.iter().rev().copied().collect())
        .collect();
    let (value, gradient) = value_and_gradient(&log_q, DType::F64, &|q| {
        universal_logit(like(&log_p, &q), q)
    });
    assert_eq!((value, gradient), (vec![0.0; 2], vec![0.0; 8]));
}

/// Computes the sparse distance. A row is the support and then the tail; `ranks` tokens of the support have known
/// ranks.
fn by_rank_sparse(log_p: &Rows, log_q: &Rows, ranks: usize) -> Vec<f64> {
    let row = |(p, q): (&Vec<f64>, &Vec<f64>)| {
        let support: Vec<f64> = p[..p.len() - 1]
            .iter()
            .copied()
            .filter(|&x| x > EMPTY)
            .collect();
        let (mut p, q) = (sorted(&support), sorted(q));
        p.truncate(ranks.min(q.len()));
        let head: f64 = p.iter().zip(&q).map(|(p, q)| (p - q).abs()).sum();
        let tail = (1.0 - p.iter().sum::<f64>()) - q[p.len()..].iter().sum::<f64>();
        head + tail.abs()
    };
    log_p.iter().zip(log_q).map(row).collect()
}

/// Returns the k likeliest tokens of each row, unordered, and the tail.
fn buckets(log_p: &Rows, k: usize) -> Rows {
    let row = |row: &Vec<f64>| {
        let mut ids: Vec<usize> = (0..row.len()).collect();
        ids.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        let tail: f64 = ids[k..].iter().map(|&id| row[id].exp()).sum();
        ids.truncate(k);
        ids.sort_unstable();
        let mut row: Vec<f64> = ids.iter().map(|&id| row[id]).collect();
        row.push(tail.max(2f64.powi(-60)).ln());
        row
    };
    log_p.iter().map(row).collect()
}

#[test]
fn universal_logit_of_a_sparse_teacher() {
    let teacher = log_softmaxes(&random(5, 12, 3.0, 16));
    let student = random(5, 8, 3.0, 17);
    for k in [1, 4, 8, 12] {
        let mut log_p = buckets(&teacher, k);
        if k == 4 {
            log_p[2][1] = EMPTY;
            log_p[3][..4].fill(EMPTY);
        }
        for ranks in [1, 3, k] {
            check(
                "sparse universal logit",
                &student,
                |z| universal_logit_sparse(like(&log_p, &z), log_softmax(z, 1), ranks),
                |z| by_rank_sparse(&log_p, &log_softmaxes(z), ranks),
            );
        }
    }
}

#[test]
fn a_sparse_distance_is_at_most_the_dense_one() {
    let (mut below, mut equal) = (0, 0);
    for seed in 0..40 {
        let teacher = log_softmaxes(&random(16, 10, 4.0, 100 + seed));
        let student = log_softmaxes(&random(16, 14, 4.0, 200 + seed));
        let dense = numbers(universal_logit(constant(&teacher), constant(&student)));
        for k in [1, 3, 10] {
            let log_p = constant(&buckets(&teacher, k));
            let sparse = numbers(universal_logit_sparse(log_p, constant(&student), k));
            for (sparse, dense) in sparse.iter().zip(&dense) {
                assert!(*sparse <= dense + 1e-12, "{sparse} {dense}");
                if *sparse < dense - 1e-6 {
                    below += 1;
                } else {
                    equal += 1;
                }
            }
        }
    }
    assert!(below > 100 && equal > 100, "{below} {equal}");
}
