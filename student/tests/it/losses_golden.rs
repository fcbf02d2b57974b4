//! Comparison with TRL, Liger and PyTorch: `tests/golden/losses.py` writes their numbers to
//! `tests/golden/losses.json`.

use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use potstill_student::loss::{Divergence, Tail, smoothed_cross_entropy};
use serde_json::Value;

use crate::losses::log_q;

struct Golden {
    json: Value,
    dtype: DType,
    tolerance: f64,
}

impl Golden {
    fn numbers(&self, at: &Value) -> Vec<f64> {
        at.as_array()
            .unwrap()
            .iter()
            .map(|x| x.as_f64().unwrap())
            .collect()
    }

    fn logits(&self, name: &str) -> Tensor<2> {
        let count = |name: &str| self.json[name].as_u64().unwrap() as usize;
        let data = TensorData::new(
            self.numbers(&self.json[name]),
            [count("rows"), count("vocab")],
        );
        Tensor::from_data(data, (&Device::flex(), self.dtype))
    }

    /// Compares `loss`, a function from the student's logits to a value for each row, with an entry. An entry with a
    /// single value is the sum over rows.
    fn check(&self, name: &str, entry: &Value, loss: impl Fn(Tensor<2>) -> Tensor<1>) {
        let logits_nv = Tensor::from_inner(self.logits("student")).require_grad();
        let values_n = loss(logits_nv.clone());
        let mut tape = values_n.clone().sum().backward();
        let gradient_nv = logits_nv.grad_remove(&mut tape).unwrap();
        let gradient: Vec<f64> = gradient_nv.into_data().iter::<f64>().collect();
        let mut values: Vec<f64> = values_n.into_data().iter::<f64>().collect();
        let want = self.numbers(&entry["values"]);
        if want.len() == 1 {
            values = vec![values.iter().sum()];
        }
        let worst = |got: &[f64], want: &[f64]| {
            assert_eq!(got.len(), want.len());
            let off = got
                .iter()
                .zip(want)
                .map(|(a, b)| (a - b).abs() / b.abs().max(1.0));
            off.fold(0.0, f64::max)
        };
        let value = worst(&values, &want);
        let slope = worst(&gradient, &self.numbers(&entry["gradient"]));
        println!(
            "{name}, {:?}: value {value:.1e}, gradient {slope:.1e}",
            self.dtype
        );
        assert!(value <= self.tolerance, "{name}: {values:?}, {want:?}");
        assert!(slope <= self.tolerance, "{name}: {slope:.1e}");
    }

    /// Checks a divergence over the whole vocabulary, as in TRL and PyTorch.
    fn dense(&self, name: &str, entry: &Value, divergence: &Divergence) {
        let log_p_nv = log_softmax(self.logits("teacher"), 1);
        self.check(name, entry, |z| {
            divergence.rows(log_p_nv.clone(), log_softmax(z, 1))
        });
    }

    fn sparse(&self, name: &str, divergence: &Divergence, tail: Tail) {
        let rows = self.json["support"].as_array().unwrap();
        let ids: Vec<i32> = rows
            .iter()
            .flat_map(|row| self.numbers(row))
            .map(|id| id as i32)
            .collect();
        let data = TensorData::new(ids.clone(), [rows.len(), ids.len() / rows.len()]);
        let support_nk = Tensor::<2, Int>::from_data(data, (&Device::flex(), DType::I32));
        let log_p_nk = log_q(self.logits("teacher"), support_nk.clone());
        self.check(name, &self.json[name], |z| {
            let (log_p_nk, log_q_nk) = tail.apply(log_p_nk.clone(), log_q(z, support_nk.clone()));
            divergence.rows(log_p_nk, log_q_nk)
        });
    }
}

fn goldens(dtype: DType, tolerance: f64) {
    let json = serde_json::from_str(include_str!("../golden/losses.json")).unwrap();
    let golden = Golden {
        json,
        dtype,
        tolerance,
    };
    for peer in ["trl_jsd", "liger_jsd"] {
        let entries = golden.json[peer].as_array().unwrap();
        assert_eq!(entries.len(), 5, "the ends and three between");
        for entry in entries {
            let beta = entry["beta"].as_f64().unwrap();
            golden.dense(
                &format!("{peer}, β = {beta}"),
                entry,
                &Divergence::Jsd { beta },
            );
        }
    }
    for (name, divergence) in [
        ("forward_kl", Divergence::ForwardKl),
        ("reverse_kl", Divergence::ReverseKl),
        ("skew_kl_0.1", Divergence::SkewKl { alpha: 0.1 }),
        (
            "skew_reverse_kl_0.1",
            Divergence::SkewReverseKl { alpha: 0.1 },
        ),
        ("total_variation", Divergence::TotalVariation),
    ] {
        golden.dense(name, &golden.json[name], &divergence);
    }
    golden.sparse("bucket_forward_kl", &Divergence::ForwardKl, Tail::Bucket);
    golden.sparse("bucket_reverse_kl", &Divergence::ReverseKl, Tail::Bucket);
    golden.sparse(
        "renormalize_forward_kl",
        &Divergence::ForwardKl,
        Tail::Renormalize,
    );

    let labels = golden.numbers(&golden.json["labels"]);
    let labels: Vec<i32> = labels.into_iter().map(|id| id as i32).collect();
    let data = TensorData::new(labels.clone(), [labels.len(), 1]);
    let labels_n1 = Tensor::<2, Int>::from_data(data, (&Device::flex(), DType::I32));
    golden.check(
        "cross_entropy_0.1",
        &golden.json["cross_entropy_0.1"],
        |z| {
            let log_q_nv = log_softmax(z, 1);
            let vocab = log_q_nv.dims()[1];
            let log_q_n1 = log_q_nv.clone().gather(1, labels_n1.clone());
            smoothed_cross_entropy(log_q_n1, log_q_nv.sum_dim(1), vocab, 0.1)
        },
    );
}

#[test]
fn goldens_in_f64() {
    goldens(DType::F64, 1e-12);
}

/// The tolerance allows for Liger's entry, a sum over rows of up to 20 nats, and for logits up to 20.
#[test]
fn goldens_in_f32() {
    goldens(DType::F32, 5e-6);
}
