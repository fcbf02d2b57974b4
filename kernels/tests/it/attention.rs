//! Attention within documents: the plain loops and the CubeCL kernels are compared with tensor operations in f64, in
//! their output and in the gradients of queries, keys, values and sinks.

use burn::backend::{Autodiff, Backend, Flex, ops::*};
use burn::tensor::{DType, Device, Tensor, TensorData, try_read_sync};
use potstill_kernels::{AttentionOps, AttentionOptions, attention, attention_reference};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

struct Case {
    documents: Vec<usize>,
    options: AttentionOptions,
    /// Width of a head of queries and keys, and of values.
    widths: [usize; 2],
    /// A sink that takes a visible part of the weight, or none: then the sinks are [`NO_SINK`].
    has_sinks: bool,
}

/// The number that the backend form takes for a head without a sink.
const NO_SINK: f64 = -3.0e38;

impl Case {
    fn new(documents: &[usize], [heads, key_heads]: [usize; 2], e: usize) -> Self {
        Self {
            documents: documents.to_vec(),
            options: AttentionOptions {
                heads,
                key_heads,
                scale: (e as f64).powf(-0.5),
                softcap: None,
                window: None,
            },
            widths: [e, e],
            has_sinks: false,
        }
    }

    fn softcap(mut self, c: f64) -> Self {
        self.options.softcap = Some(c);
        self
    }

    fn window(mut self, window: usize) -> Self {
        self.options.window = Some(window);
        self
    }

    fn value_width(mut self, width: usize) -> Self {
        self.widths[1] = width;
        self
    }

    fn sinks(mut self) -> Self {
        self.has_sinks = true;
        self
    }

    /// q, k, v and the gradient of the output, in numbers that every half precision represents exactly.
    fn matrices(&self) -> [TensorData; 4] {
        let (n, [e, w]) = (self.documents.iter().sum::<usize>(), self.widths);
        let (heads, keys) = (self.options.heads, self.options.key_heads);
        let mut rng = ChaCha8Rng::seed_from_u64((n * 1_000_003 + heads * 101 + e) as u64);
        [heads * e, keys * e, keys * w, heads * w].map(|columns| {
            let sixteenths = (0..n * columns).map(|_| rng.random_range(-32..=32));
            let numbers: Vec<f64> = sixteenths.map(|number| f64::from(number) / 16.0).collect();
            TensorData::new(numbers, [n, columns])
        })
    }

    /// A sink for each head.
    fn sink_data(&self) -> TensorData {
        let sink = |head: usize| match self.has_sinks {
            true => head as f64 / 2.0 - 1.0,
            false => NO_SINK,
        };
        let sinks: Vec<f64> = (0..self.options.heads).map(sink).collect();
        TensorData::new(sinks, [self.options.heads])
    }
}

/// Lengths around blocks of 64 rows, and widths of a head for which the kernels stage different numbers of rows.
fn cases() -> Vec<Case> {
    vec![
        Case::new(&[1], [4, 1], 16),
        Case::new(&[63], [4, 1], 16),
        Case::new(&[64], [2, 2], 16),
        Case::new(&[65], [4, 1], 16),
        Case::new(&[1, 1, 62, 1, 3, 100, 27], [4, 1], 16),
        Case::new(&[64, 64, 129], [9, 3], 64),
        Case::new(&[40, 200], [9, 3], 64).window(70),
        Case::new(&[130, 1, 70], [4, 1], 80),
        Case::new(&[130, 1, 70], [4, 1], 80).window(1),
        Case::new(&[150, 9], [4, 1], 64).softcap(1.5),
        Case::new(&[150, 9], [4, 2], 64).softcap(3.0).window(64),
        Case::new(&[5, 70], [3, 3], 7),
        Case::new(&[90], [2, 1], 256),
        Case::new(&[70, 3], [4, 2], 16).sinks(),
        Case::new(&[130, 1, 70], [9, 3], 64).sinks().window(30),
        Case::new(&[5, 70], [4, 4], 24).value_width(16),
        Case::new(&[150, 9], [4, 1], 16)
            .value_width(80)
            .sinks()
            .softcap(2.0),
        Case::new(&[70], [2, 2], 192).value_width(128),
    ]
}

type Form = fn(
    Tensor<2>,
    Tensor<2>,
    Tensor<2>,
    Option<Tensor<1>>,
    &[usize],
    &AttentionOptions,
) -> Tensor<2>;

/// The output and the gradients of q, k, v and the sinks, which are empty without sinks.
type Results = [Vec<f64>; 5];

/// Computes the results of a form of the op.
fn run(case: &Case, device: &Device, dtype: DType, form: Form) -> Results {
    let device = device.clone().autodiff();
    let [q, k, v, weights] = case
        .matrices()
        .map(|data| Tensor::<2>::from_data(data, (&device, dtype)));
    let inputs = [q, k, v].map(Tensor::require_grad);
    let [q, k, v] = inputs.clone();
    let sinks = Tensor::<1>::from_data(case.sink_data(), (&device, dtype)).require_grad();
    let sinks = case.has_sinks.then_some(sinks);
    let output = form(q, k, v, sinks.clone(), &case.documents, &case.options);
    let mut gradients = (output.clone() * weights).sum().backward();
    let [dq, dk, dv] = inputs.map(|input| input.grad_remove(&mut gradients).unwrap());
    let dsinks = sinks.map(|sinks| sinks.grad_remove(&mut gradients).unwrap());
    let dsinks = dsinks.map_or_else(Vec::new, |dsinks| dsinks.into_data().iter().collect());
    let [output, dq, dk, dv] =
        [output.inner(), dq, dk, dv].map(|tensor| tensor.into_data().iter::<f64>().collect());
    [output, dq, dk, dv, dsinks]
}

/// Computes the results of [`run`] on a backend type directly, without the device dispatch and so without operator
/// fusion.
fn run_on<B: Backend + AttentionOps>(case: &Case, device: &B::Device) -> Results {
    let tensor = |data: TensorData| Autodiff::<B>::float_from_data(data.convert::<f32>(), device);
    let [q, k, v, weights] = case.matrices().map(tensor);
    let sinks = tensor(case.sink_data());
    let [q, k, v, sinks] = [q, k, v, sinks].map(|tensor| tensor.require_grad());
    let inputs = [q.clone(), k.clone(), v.clone(), sinks.clone()];
    let (output, _) = <Autodiff<B> as AttentionOps>::attention_forward(
        q,
        k,
        v,
        sinks,
        case.documents.clone(),
        case.options,
    );
    let weighted = Autodiff::<B>::float_mul(output.clone(), weights);
    let gradients = Autodiff::<B>::float_sum(weighted).backward();
    let [dq, dk, dv, dsinks] = inputs.map(|input| input.grad(&gradients).unwrap());
    let results = [output.into_primitive(), dq, dk, dv, dsinks];
    let mut results: Results = results.map(|tensor| {
        let data = try_read_sync(B::float_into_data(tensor)).unwrap().unwrap();
        data.iter::<f64>().collect()
    });
    if !case.has_sinks {
        assert!(results[4].iter().all(|gradient| *gradient == 0.0));
        results[4].clear();
    }
    results
}

/// Returns the largest difference in each result, relative to the largest number of that result.
fn worst(found: &Results, exact: &Results) -> [f64; 5] {
    std::array::from_fn(|result| {
        let (found, exact) = (&found[result], &exact[result]);
        assert_eq!(found.len(), exact.len());
        let size = exact.iter().fold(1.0f64, |size, x| size.max(x.abs()));
        let pairs = found.iter().zip(exact);
        pairs.fold(0.0, |worst, (found, exact)| {
            assert!(found.is_finite());
            f64::max(worst, (found - exact).abs() / size)
        })
    })
}

fn compare(name: &str, cases: Vec<Case>, tolerance: f64, run: impl Fn(&Case) -> Results) {
    for case in cases {
        let exact = self::run(&case, &Device::flex(), DType::F64, attention_reference);
        let worst = worst(&run(&case), &exact);
        let what = format!(
            "{name} {:?} widths={:?} sinks={} {:?}",
            case.documents, case.widths, case.has_sinks, case.options
        );
        let [o, dq, dk, dv, ds] = worst;
        println!("{what}: o {o:.1e}, dq {dq:.1e}, dk {dk:.1e}, dv {dv:.1e}, dsinks {ds:.1e}");
        assert!(
            worst.iter().all(|worst| *worst <= tolerance),
            "{what}: {worst:?}"
        );
    }
}

#[test]
fn plain_loops_in_f32_equal_tensor_operations() {
    compare("plain loops", cases(), 5e-6, |case| {
        run(case, &Device::flex(), DType::F32, attention)
    });
}

#[test]
fn plain_loops_without_dispatch_equal_tensor_operations() {
    compare("plain loops, no dispatch", cases(), 5e-6, |case| {
        run_on::<Flex>(case, &Default::default())
    });
}

#[cfg(feature = "cube")]
#[test]
fn kernels_without_fusion_equal_tensor_operations() {
    use burn_cubecl::{CubeBackend, CubeDevice};
    compare("kernels, no dispatch, no fusion", cases(), 5e-5, |case| {
        run_on::<CubeBackend>(case, &CubeDevice::default())
    });
}

#[cfg(feature = "cube")]
#[test]
fn kernels_equal_tensor_operations() {
    let device = Device::default();
    println!("device: {device:?}, fusion: {}", cfg!(feature = "fusion"));
    assert!(
        !format!("{device:?}").contains("Flex"),
        "no GPU backend was selected"
    );
    compare("kernels on the GPU", cases(), 5e-5, |case| {
        run(case, &device, DType::F32, attention)
    });
    for (dtype, tolerance) in [(DType::F16, 2e-3), (DType::BF16, 2e-2)] {
        if !device.supports_dtype(dtype) {
            println!("skipped: the device has no {dtype:?}");
            continue;
        }
        // A few cases suffice, because only loads and stores differ from f32.
        let few = vec![
            Case::new(&[65], [4, 1], 16),
            Case::new(&[40, 200], [9, 3], 64).window(70),
            Case::new(&[130, 1, 70], [4, 1], 80).softcap(3.0),
            Case::new(&[70, 3], [4, 2], 24).value_width(16).sinks(),
        ];
        let name = format!("kernels on the GPU, {dtype:?}");
        compare(&name, few, tolerance, |case| {
            run(case, &device, dtype, attention)
        });
    }
}

#[cfg(feature = "cube")]
#[test]
fn the_same_input_gives_the_same_bits() {
    let device = Device::default();
    for case in [
        Case::new(&[64, 64, 129], [9, 3], 64),
        Case::new(&[130, 1, 70], [4, 1], 80).softcap(2.0),
        Case::new(&[130, 70], [4, 2], 24).value_width(16).sinks(),
    ] {
        let twice = [(); 2].map(|()| run(&case, &device, DType::F32, attention));
        assert!(twice[0] == twice[1]);
        // Tensor operations would give different bits, so this also shows that the dispatch chose the kernels.
        assert!(twice[0] == run_on::<burn_cubecl::CubeBackend>(&case, &Default::default()));
    }
}
