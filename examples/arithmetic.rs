//! Prints arithmetic problems as JSONL: additions and subtractions of up to three digits, and products
//! of a two-digit and a one-digit number (worked products also of three digits and one).
//!
//!     cargo run --release --example arithmetic -- prompts 2000 1   # question, answer, operation
//!     cargo run --release --example arithmetic -- worked 60000 1   # conversations with steps
//!
//! A worked problem is written in one of four random styles with random words and separators, so that
//! a model learns a distribution instead of one text. The two kinds never share a problem: a hash of
//! the problem assigns it to one of them. The same seed gives the same lines.

use std::collections::HashSet;
use std::io::Write;

use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

const OPENERS: [&str; 4] = ["first ", "start ", "now ", "well "];
const SEPARATORS: [&str; 4] = ["; ", ", ", " then ", " next "];
const CLOSERS: [&str; 4] = [" so", " thus", " done", " hence"];
const PLACES: [&str; 3] = ["ones: ", "tens: ", "hundreds: "];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Operation {
    Addition,
    Subtraction,
    Multiplication,
}

use Operation::{Addition, Multiplication, Subtraction};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Problem {
    operation: Operation,
    a: u32,
    b: u32,
}

impl Problem {
    /// Draws a problem, mostly with long numbers, since there are few short ones. Worked products are as
    /// frequent as the other operations and include three-digit numbers: there are only 720 products of
    /// a two-digit number, and half of them show few of the steps that the other half needs.
    fn draw(worked: bool, random: &mut ChaCha8Rng) -> Problem {
        let (additions, subtractions, products) = if worked { (9, 8, 9) } else { (9, 8, 3) };
        let operation = match random.random_range(0..additions + subtractions + products) {
            n if n < additions => Addition,
            n if n < additions + subtractions => Subtraction,
            _ => Multiplication,
        };
        let number = |random: &mut ChaCha8Rng| match random.random_range(0..8) {
            0 => random.random_range(0..100),
            _ => random.random_range(100..1000),
        };
        let (a, b) = match operation {
            Multiplication => {
                let longest = if worked && random.random() { 1000 } else { 100 };
                (random.random_range(10..longest), random.random_range(2..10))
            }
            _ => (number(random), number(random)),
        };
        match operation {
            Subtraction => Problem {
                operation,
                a: a.max(b),
                b: a.min(b),
            },
            _ => Problem { operation, a, b },
        }
    }

    fn text(&self) -> String {
        let sign = match self.operation {
            Addition => '+',
            Subtraction => '-',
            Multiplication => '*',
        };
        format!("{}{sign}{}", self.a, self.b)
    }

    fn result(&self) -> u32 {
        match self.operation {
            Addition => self.a + self.b,
            Subtraction => self.a - self.b,
            Multiplication => self.a * self.b,
        }
    }

    fn name(&self) -> &'static str {
        match self.operation {
            Addition => "addition",
            Subtraction => "subtraction",
            Multiplication => "multiplication",
        }
    }

    /// Returns whether the problem belongs to the worked problems; the other half are prompts. The hash is
    /// FNV-1a; its lowest bit is not used, since it is only a parity of the digits.
    fn is_worked(&self) -> bool {
        let hash = self
            .text()
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            });
        hash >> 37 & 1 == 0
    }

    /// Writes the steps, one equation each.
    fn steps(&self, style: u32) -> Vec<String> {
        match (self.operation, style) {
            (_, 0) => self.columns(false),
            (_, 1) => self.columns(true),
            (Addition, 2) => self.sum_of_parts(),
            (Multiplication, 2) => self.product_of_parts(false),
            (Multiplication, _) => self.product_of_parts(true),
            (_, 2) => self.jumps(&[1, 10, 100]),
            _ => self.jumps(&[100, 10, 1]),
        }
    }

    /// Computes column by column from the right, with carries; `named` writes the name of each column.
    fn columns(&self, named: bool) -> Vec<String> {
        let digits = self.a.max(self.b).to_string().len();
        let digit = |number: u32, place: usize| number / 10u32.pow(place as u32) % 10;
        let mut carry = 0;
        let mut steps = Vec::new();
        for (place, name) in PLACES.iter().enumerate().take(digits) {
            let (x, y) = (digit(self.a, place), digit(self.b, place));
            let (left, sign, value) = match self.operation {
                Addition => (format!("{x}+{y}"), '+', x + y + carry),
                Multiplication => (format!("{x}*{}", self.b), '+', x * self.b + carry),
                Subtraction => {
                    let borrows = x < y + carry;
                    let x = if borrows { x + 10 } else { x };
                    (format!("{x}-{y}"), '-', x - y - carry)
                }
            };
            let before = match carry {
                0 => left.clone(),
                carry => format!("{left}{sign}{carry}"),
            };
            carry = match self.operation {
                Subtraction => u32::from(x < y + carry),
                _ => value / 10,
            };
            let name = if named { name } else { "" };
            steps.push(format!("{name}{before}={value}"));
        }
        steps
    }

    /// Adds hundreds, tens and ones separately, then adds their sums.
    fn sum_of_parts(&self) -> Vec<String> {
        let part = |number: u32, place: u32| number / place % 10 * place;
        let mut steps = Vec::new();
        let mut sums = Vec::new();
        for place in [100, 10, 1] {
            let (x, y) = (part(self.a, place), part(self.b, place));
            if x + y > 0 {
                steps.push(format!("{x}+{y}={}", x + y));
                sums.push(x + y);
            }
        }
        add_up(&sums, &mut steps);
        steps
    }

    /// Multiplies each part of the first number by the second, then adds the products.
    fn product_of_parts(&self, ones_first: bool) -> Vec<String> {
        let mut places = [100, 10, 1];
        if ones_first {
            places.reverse();
        }
        let parts = places.map(|place| self.a / place % 10 * place);
        let mut steps = Vec::new();
        let mut products = Vec::new();
        for part in parts.into_iter().filter(|part| *part > 0) {
            steps.push(format!("{part}*{}={}", self.b, part * self.b));
            products.push(part * self.b);
        }
        add_up(&products, &mut steps);
        steps
    }

    /// Adds or subtracts the parts of the second number one by one, in the order of `places`.
    fn jumps(&self, places: &[u32]) -> Vec<String> {
        let mut total = self.a;
        let mut steps = Vec::new();
        for place in places {
            let part = self.b / place % 10 * place;
            if part > 0 {
                let (sign, next) = match self.operation {
                    Addition => ('+', total + part),
                    _ => ('-', total - part),
                };
                steps.push(format!("{total}{sign}{part}={next}"));
                total = next;
            }
        }
        steps
    }

    fn reasoning(&self, random: &mut ChaCha8Rng) -> String {
        let mut text = pick(&OPENERS, random).to_owned();
        for (i, step) in self.steps(random.random_range(0..4)).iter().enumerate() {
            if i > 0 {
                text += pick(&SEPARATORS, random);
            }
            text += step;
        }
        text + pick(&CLOSERS, random)
    }
}

/// Adds the numbers one after the other, with a step for each sum.
fn add_up(numbers: &[u32], steps: &mut Vec<String>) {
    let mut total = numbers.first().copied().unwrap_or(0);
    for number in numbers.iter().skip(1) {
        steps.push(format!("{total}+{number}={}", total + number));
        total += number;
    }
}

fn pick<'a>(words: &[&'a str; 4], random: &mut ChaCha8Rng) -> &'a str {
    words.choose(random).copied().unwrap_or_default()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, count, seed] = arguments.as_slice() else {
        return Err("usage: arithmetic prompts|worked COUNT SEED".into());
    };
    let (count, seed) = (count.parse::<usize>()?, seed.parse::<u64>()?);
    let worked = match kind.as_str() {
        "prompts" => false,
        "worked" => true,
        other => return Err(format!("expected `prompts` or `worked`, not `{other}`").into()),
    };
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut seen = HashSet::new();
    let mut written = 0;
    let mut out = std::io::stdout().lock();
    while written < count {
        let problem = Problem::draw(worked, &mut random);
        // A problem may be worked several times in different words, but is a prompt only once.
        if problem.is_worked() != worked || !worked && !seen.insert(problem) {
            continue;
        }
        let (question, answer) = (problem.text(), problem.result().to_string());
        let line = if worked {
            let reasoning = problem.reasoning(&mut random);
            json!({ "messages": [
                { "role": "user", "content": question },
                { "role": "assistant", "reasoning": reasoning, "content": answer },
            ] })
        } else {
            json!({ "question": question, "answer": answer, "operation": problem.name() })
        };
        writeln!(out, "{line}")?;
        written += 1;
    }
    Ok(())
}
