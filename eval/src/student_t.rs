//! Student's t distribution.
//!
//! The tail probability is a regularised incomplete beta function (Abramowitz & Stegun 26.7.1), computed from its
//! continued fraction by the modified Lentz method (Press et al., Numerical Recipes, 3rd ed., §6.4).

/// Returns P(|T| ≥ |t|) for T with `freedom` > 0 degrees of freedom.
pub(crate) fn two_sided(t: f64, freedom: f64) -> f64 {
    if t.is_infinite() {
        return 0.0;
    }
    incomplete_beta(freedom / (freedom + t * t), 0.5 * freedom, 0.5)
}

/// Returns the t ≥ 0 at which a decreasing tail probability is `level`, by false position on its logarithm. The value at
/// the end that stays is halved, so that both ends of the bracket move.
pub(crate) fn critical(level: f64, tail: impl Fn(f64) -> f64) -> f64 {
    let excess = |t: f64| (tail(t) / level).ln();
    let (mut low, mut high) = (0.0, 2.0);
    let (mut at_low, mut at_high) = (excess(low), excess(high));
    while at_high > 0.0 && high < 1e12 {
        (low, at_low) = (high, at_high);
        high *= 2.0;
        at_high = excess(high);
    }
    for _ in 0..100 {
        let t = (low * at_high - high * at_low) / (at_high - at_low);
        let at_t = excess(t);
        if at_t.abs() < 1e-13 {
            return t;
        }
        if at_t > 0.0 {
            (low, at_low) = (t, at_t);
            at_high *= 0.5;
        } else {
            (high, at_high) = (t, at_t);
            at_low *= 0.5;
        }
    }
    0.5 * (low + high)
}

/// Regularised incomplete beta function I_x(a, b), 0 ≤ x ≤ 1.
fn incomplete_beta(x: f64, a: f64, b: f64) -> f64 {
    if x <= 0.0 || x >= 1.0 {
        return x.clamp(0.0, 1.0);
    }
    // The fraction converges quickly below the mean of the distribution; above it, I_x(a, b) = 1 − I_{1−x}(b, a).
    if x > (a + 1.0) / (a + b + 2.0) {
        return 1.0 - incomplete_beta(1.0 - x, b, a);
    }
    let front = ln_gamma(a + b) - ln_gamma(a) - ln_gamma(b) + a * x.ln() + b * (-x).ln_1p();
    front.exp() * beta_fraction(x, a, b) / a
}

fn beta_fraction(x: f64, a: f64, b: f64) -> f64 {
    const TINY: f64 = 1e-300;
    let nonzero = |value: f64| if value.abs() < TINY { TINY } else { value };
    let (mut c, mut d) = (1.0, 1.0 / nonzero(1.0 - (a + b) * x / (a + 1.0)));
    let mut fraction = d;
    for m in 1..1000 {
        let m = f64::from(m);
        let even = m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m));
        let odd = -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0));
        for term in [even, odd] {
            d = 1.0 / nonzero(1.0 + term * d);
            c = nonzero(1.0 + term / c);
            fraction *= c * d;
        }
        if (c * d - 1.0).abs() < 1e-15 {
            break;
        }
    }
    fraction
}

/// Natural logarithm of Γ(x), x > 0, by Stirling's series after x was raised above 10 (Abramowitz & Stegun 6.1.41).
fn ln_gamma(mut x: f64) -> f64 {
    let mut shift = 0.0;
    while x < 10.0 {
        shift += x.ln();
        x += 1.0;
    }
    let y = 1.0 / (x * x);
    let series =
        (1.0 / 12.0 - y * (1.0 / 360.0 - y * (1.0 / 1260.0 - y * (1.0 / 1680.0 - y / 1188.0)))) / x;
    (x - 0.5) * x.ln() - x + 0.5 * (2.0 * std::f64::consts::PI).ln() + series - shift
}

#[cfg(test)]
mod tests {
    use super::*;

    /// python: scipy.stats.t.ppf(0.975, freedom), and ppf(0.995, freedom)
    #[test]
    fn quantiles_equal_those_of_scipy() {
        for (freedom, at_95, at_99) in QUANTILES {
            for (level, expected) in [(0.05, at_95), (0.01, at_99)] {
                let found = critical(level, |t| two_sided(t, freedom));
                assert!(
                    (found / expected - 1.0).abs() < 1e-9,
                    "{freedom} {level}: {found} instead of {expected}"
                );
            }
        }
    }

    /// python: 2 * scipy.stats.t.sf(t, freedom)
    #[test]
    fn tails_equal_those_of_scipy() {
        for (t, freedom, expected) in TAILS {
            let found = two_sided(t, freedom);
            assert!(
                (found / expected - 1.0).abs() < 1e-9,
                "{t} {freedom}: {found} instead of {expected}"
            );
            assert_eq!(found, two_sided(-t, freedom));
        }
        assert_eq!(two_sided(0.0, 5.0), 1.0);
        assert_eq!(two_sided(f64::INFINITY, 5.0), 0.0);
    }

    const QUANTILES: [(f64, f64, f64); 6] = [
        (1.0, 12.7062047361747, 63.6567411628715),
        (2.0, 4.30265272974946, 9.92484320091829),
        (4.0, 2.77644510519779, 4.60409487134999),
        (9.0, 2.2621571627982, 3.24983554159213),
        (39.0, 2.02269092003676, 2.70791318351766),
        (399.0, 1.96592729592088, 2.58820716403098),
    ];
    const TAILS: [(f64, f64, f64); 8] = [
        (0.5, 1.0, 7.048327646991335e-01),
        (2.5, 2.0, 1.296117202215108e-01),
        (4.302652729911275, 2.0, 4.999999999651663e-02),
        (1.0, 5.0, 3.632174676491229e-01),
        (3.0, 39.0, 4.686567940364685e-03),
        (1.96, 100000.0, 4.999856319430168e-02),
        (8.0, 399.0, 1.364765294051435e-14),
        (40.0, 5.0, 1.841196217177295e-07),
    ];
}
