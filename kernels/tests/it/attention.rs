//! Attention within documents: plain loops and CubeCL kernels against tensor operations in f64, values and
//! the three gradients.

use burn::backend::{Autodiff, Backend, Flex, ops::*};
use burn::tensor::{DType, Device, Tensor, TensorData, try_read_sync};
use potstill_kernels::{Attention, AttentionOps, attention, attention_reference};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

struct Case {
    documents: Vec<usize>,
    how: Attention,
    /// Width of a head.
    e: usize,
    /// q, k, v, and the gradient that is put on the output; all of them numbers that every half
    /// precision holds.
    numbers: [Vec<f64>; 4],
}

impl Case {
    fn new(documents: &[usize], [heads, key_heads]: [usize; 2], e: usize) -> Self {
        let n: usize = documents.iter().sum();
        let mut rng = ChaCha8Rng::seed_from_u64((n * 1_000_003 + heads * 101 + e) as u64);
        let numbers = [heads, key_heads, key_heads, heads].map(|heads| {
            let sixteenths = (0..n * heads * e).map(|_| rng.random_range(-32..=32));
            sixteenths.map(|number| f64::from(number) / 16.0).collect()
        });
        Self {
            documents: documents.to_vec(),
            how: Attention {
                heads,
                key_heads,
                scale: (e as f64).powf(-0.5),
                softcap: None,
                window: None,
            },
            e,
            numbers,
        }
    }

    fn softcap(mut self, c: f64) -> Self {
        self.how.softcap = Some(c);
        self
    }

    fn window(mut self, window: usize) -> Self {
        self.how.window = Some(window);
        self
    }

    /// Columns of q, k, v and the output.
    fn columns(&self) -> [usize; 4] {
        let (heads, keys) = (self.how.heads * self.e, self.how.key_heads * self.e);
        [heads, keys, keys, heads]
    }

    fn data(&self) -> [TensorData; 4] {
        let n = self.documents.iter().sum();
        let mut columns = self.columns().into_iter();
        self.numbers
            .clone()
            .map(|numbers| TensorData::new(numbers, [n, columns.next().unwrap()]))
    }
}

/// Around blocks of 64, and for each shape of a head what the kernels' staging makes of it.
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
    ]
}

type Form = fn(Tensor<2>, Tensor<2>, Tensor<2>, &[usize], &Attention) -> Tensor<2>;

/// The output, and the gradients of q, k and v.
fn run(case: &Case, device: &Device, dtype: DType, form: Form) -> [Vec<f64>; 4] {
    let device = device.clone().autodiff();
    let [q, k, v, weights] = case
        .data()
        .map(|data| Tensor::<2>::from_data(data, (&device, dtype)));
    let inputs = [q, k, v].map(Tensor::require_grad);
    let [q, k, v] = inputs.clone();
    let output = form(q, k, v, &case.documents, &case.how);
    let mut gradients = (output.clone() * weights).sum().backward();
    let [dq, dk, dv] = inputs.map(|input| input.grad_remove(&mut gradients).unwrap());
    [output.inner(), dq, dk, dv].map(|tensor| tensor.into_data().iter::<f64>().collect())
}

/// As [`run`], on a backend by its type: past the device dispatch, hence without operator fusion even where
/// that is compiled in.
fn run_on<B: Backend + AttentionOps>(case: &Case, device: &B::Device) -> [Vec<f64>; 4] {
    let [q, k, v, weights] = case
        .data()
        .map(|data| Autodiff::<B>::float_from_data(data.convert::<f32>(), device));
    let [q, k, v] = [q, k, v].map(|tensor| tensor.require_grad());
    let inputs = [q.clone(), k.clone(), v.clone()];
    let (output, _) =
        <Autodiff<B> as AttentionOps>::attention_rows(q, k, v, case.documents.clone(), case.how);
    let weighted = Autodiff::<B>::float_mul(output.clone(), weights);
    let gradients = Autodiff::<B>::float_sum(weighted).backward();
    let [dq, dk, dv] = inputs.map(|input| input.grad(&gradients).unwrap());
    [output.into_primitive(), dq, dk, dv].map(|tensor| {
        let data = try_read_sync(B::float_into_data(tensor)).unwrap().unwrap();
        data.iter::<f64>().collect()
    })
}

/// The largest difference, relative to the largest number of its kind.
fn worst(found: &[Vec<f64>; 4], exact: &[Vec<f64>; 4]) -> [f64; 4] {
    let mut of = 0..4;
    [(); 4].map(|()| {
        let of = of.next().unwrap();
        assert_eq!(found[of].len(), exact[of].len());
        let size = exact[of].iter().fold(1.0f64, |size, x| size.max(x.abs()));
        let pairs = found[of].iter().zip(&exact[of]);
        pairs.fold(0.0, |worst, (found, exact)| {
            assert!(found.is_finite());
            f64::max(worst, (found - exact).abs() / size)
        })
    })
}

fn compare(name: &str, cases: Vec<Case>, tolerance: f64, run: impl Fn(&Case) -> [Vec<f64>; 4]) {
    for case in cases {
        let exact = self::run(&case, &Device::flex(), DType::F64, attention_reference);
        let worst = worst(&run(&case), &exact);
        let what = format!("{name} {:?} e={} {:?}", case.documents, case.e, case.how);
        let [o, dq, dk, dv] = worst;
        println!("{what}: o {o:.1e}, dq {dq:.1e}, dk {dk:.1e}, dv {dv:.1e}");
        assert!(
            worst.iter().all(|worst| *worst <= tolerance),
            "{what}: {worst:?}"
        );
    }
}

#[test]
fn plain_loops_in_f32() {
    compare("plain loops", cases(), 5e-6, |case| {
        run(case, &Device::flex(), DType::F32, attention)
    });
}

#[test]
fn plain_loops_by_backend_type() {
    compare("plain loops, no dispatch", cases(), 5e-6, |case| {
        run_on::<Flex>(case, &Default::default())
    });
}

#[cfg(feature = "cube")]
#[test]
fn kernels_without_fusion() {
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
            println!("the device has no {dtype:?}");
            continue;
        }
        // Loads and stores alone differ from f32.
        let few = vec![
            Case::new(&[65], [4, 1], 16),
            Case::new(&[40, 200], [9, 3], 64).window(70),
            Case::new(&[130, 1, 70], [4, 1], 80).softcap(3.0),
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
    ] {
        let twice = [(); 2].map(|()| run(&case, &device, DType::F32, attention));
        assert!(twice[0] == twice[1]);
        // Tensor operations would give other bits, so this also says that the kernels were chosen.
        assert!(twice[0] == run_on::<burn_cubecl::CubeBackend>(&case, &Default::default()));
    }
}
