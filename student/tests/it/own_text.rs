//! The reverse KL on a student's own text, compared with plain sums over whole distributions.

use burn::tensor::DType;
use potstill_datasets::Encoded;
use potstill_student::own_text_kl;

use crate::support::{log_probs, scaled, signals, tiny};

#[test]
fn it_is_the_reverse_kl_over_the_whole_vocabulary() {
    let student = tiny(DType::F64);
    let teacher = scaled(student.clone(), 0.6);
    for signal in signals(5, 47, 77) {
        let (log_q, log_p) = (
            log_probs(&student, std::slice::from_ref(&signal.token_ids)),
            log_probs(&teacher, std::slice::from_ref(&signal.token_ids)),
        );
        let kl = |position: usize| -> f64 {
            let pairs = log_q[position - 1].iter().zip(&log_p[position - 1]);
            pairs.map(|(q, p)| q.exp() * (q - p)).sum()
        };
        let expected: f64 = signal.loss_positions().map(kl).sum();
        assert!(expected > 0.1);
        for chunk_rows in [1, 3, 100] {
            let text = Encoded {
                token_ids: signal.token_ids.clone(),
                loss_mask: signal.loss_mask.clone(),
            };
            let found = own_text_kl(&student, &teacher, text, chunk_rows).unwrap();
            assert!(
                (found - expected).abs() < 1e-9 * expected,
                "{found}, {expected}"
            );
        }
        let text = Encoded {
            token_ids: signal.token_ids.clone(),
            loss_mask: signal.loss_mask.clone(),
        };
        assert_eq!(own_text_kl(&student, &student, text, 4).unwrap(), 0.0);
    }
}

#[test]
fn an_id_outside_the_vocabulary_is_an_error() {
    let text = Encoded {
        token_ids: vec![1, 47],
        loss_mask: vec![false, true],
    };
    let model = tiny(DType::F32);
    let error = own_text_kl(&model, &model, text, 4)
        .unwrap_err()
        .to_string();
    assert!(error.contains("vocabulary of 47"), "{error}");
}
