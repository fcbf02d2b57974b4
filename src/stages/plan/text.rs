//! The plan in words.

use potstill_eval::cost::{DEEPSEEK_V3, digits};

use super::{Collecting, Plan, shown_parts};
use crate::events::duration;
use crate::stages::forecast::{dollars, large};
use crate::stages::memory::gigabytes;

/// The lines of a plan.
pub(super) fn lines(plan: &Plan) -> String {
    let mut lines = vec![parameters(plan)];
    lines.extend(memory(plan));
    lines.push(format!(
        "tokens      {} steps of {} sequences of {} tokens on average, the longest {}: {} tokens in a training (from {})",
        plan.schedule.steps,
        plan.batch,
        digits(plan.rows.mean_tokens),
        plan.rows.longest,
        large(plan.tokens() as u64),
        plan.rows.origin,
    ));
    lines.push(operations(plan));
    lines.extend(time(plan));
    lines.extend(collect(plan));
    lines.extend(cost(plan));
    lines.push(format!(
        "beside it   DeepSeek-V3 was trained in {} million H800-hours on {} trillion tokens: {} for a million tokens, ${} million at ${} an hour",
        DEEPSEEK_V3.device_hours / 1e6,
        DEEPSEEK_V3.tokens / 1e12,
        DEEPSEEK_V3.per_million("H800"),
        DEEPSEEK_V3.usd().unwrap_or_default() / 1e6,
        DEEPSEEK_V3.usd_per_hour.unwrap_or_default(),
    ));
    lines.join("\n")
}

fn parameters(plan: &Plan) -> String {
    let numbers = &plan.numbers;
    let trained = match numbers.trained == numbers.all {
        true => "all trained".to_owned(),
        false if numbers.adapter > 0 => format!(
            "and {} of adapters, which alone are trained",
            large(numbers.adapter)
        ),
        false => format!("{} of them trained", large(numbers.trained)),
    };
    format!("parameters  {}, {trained}", large(numbers.all))
}

fn memory(plan: &Plan) -> Vec<String> {
    let fit = &plan.fit;
    let peak = gigabytes(fit.memory.peak());
    let beside = match (fit.limit, fit.fits()) {
        (None, _) => "; the memory of this device is not known (`--memory-gb` sets it)".to_owned(),
        (Some(limit), true) => format!(" of {}: it fits", gigabytes(limit)),
        (Some(limit), false) => format!(" of {}: it does not fit", gigabytes(limit)),
    };
    let parts = shown_parts(&fit.memory).into_iter();
    let parts: Vec<String> = parts
        .map(|(part, bytes)| format!("{part} {}", gigabytes(bytes)))
        .collect();
    let mut lines = vec![
        format!("memory      {peak} at the peak{beside}"),
        format!("            {}", parts.join(", ")),
    ];
    if let Some(measured) = plan.steps.as_ref().and_then(|steps| steps.peak) {
        lines.push(format!(
            "            {} was the peak of the calibration",
            gigabytes(measured)
        ));
    }
    let Some(limit) = fit.limit.filter(|_| !fit.fits()) else {
        return lines;
    };
    lines.push("to fit      change in [train], one after the other:".to_owned());
    for advice in &fit.advice {
        let peak = advice.memory.peak();
        let fits = if peak <= limit { ", which fits" } else { "" };
        lines.push(format!(
            "            {:<38} {}{fits} ({})",
            advice.change,
            gigabytes(peak),
            advice.effect
        ));
    }
    if fit
        .advice
        .last()
        .is_none_or(|last| last.memory.peak() > limit)
    {
        lines.push("            and choose a smaller student: `layers`, `intermediate_size` or `random` in [student]".to_owned());
    }
    lines
}

fn operations(plan: &Plan) -> String {
    let utilisation = plan.utilisation().zip(plan.peak_flops);
    let utilisation = utilisation.map(|(share, peak)| {
        let peak = digits(peak / 1e12);
        format!(
            ", {} % of the {peak} TFLOP/s of a device",
            digits(100.0 * share)
        )
    });
    format!(
        "operations  {} FLOPs a token, attention included{}",
        large(plan.token_operations as u64),
        utilisation.unwrap_or_default()
    )
}

fn time(plan: &Plan) -> Vec<String> {
    let Some((steps, hours)) = plan.steps.as_ref().zip(plan.training_hours()) else {
        return vec!["time        not measured, because the training does not fit".to_owned()];
    };
    let (step, speed) = (plan.step_seconds(), plan.tokens_per_second());
    let smaller = match steps.batch < plan.batch {
        true => format!(" of {} sequences", steps.batch),
        false => String::new(),
    };
    let mut lines = vec![format!(
        "time        {} s a step, {} tokens/s (from {} steps{smaller}): {} for a training",
        digits(step.unwrap_or_default()),
        digits(speed.unwrap_or_default()),
        steps.steps,
        duration(hours * 3600.0),
    )];
    if let Some(all) = plan.all_hours().filter(|_| plan.trainings > 1) {
        let at_a_time = match plan.at_a_time {
            0 | 1 => "one after the other".to_owned(),
            n => format!("{n} at a time"),
        };
        lines.push(format!(
            "            {} for {} trainings (the student, its controls, seeds and learning rates), {at_a_time}",
            duration(all * 3600.0),
            plan.trainings,
        ));
    }
    lines
}

fn collect(plan: &Plan) -> Vec<String> {
    match &plan.collecting {
        Collecting::Nothing => Vec::new(),
        Collecting::Served(text) => vec![text.clone()],
        Collecting::Local(measured, answers, tokens) => {
            let hours = plan.collect_hours().unwrap_or_default();
            let about = match measured.answer_tokens {
                Some(_) => "about",
                None => "at most",
            };
            vec![format!(
                "collect     {answers} answers of {about} {} tokens at {} tokens/s: {about} {}",
                digits(*tokens),
                digits(measured.tokens_per_second),
                duration(hours * 3600.0),
            )]
        }
    }
}

fn cost(plan: &Plan) -> Vec<String> {
    let Some(cost) = plan.cost() else {
        return Vec::new();
    };
    let usd = match (cost.usd(), cost.usd_per_hour) {
        (Some(usd), Some(price)) => format!(", {} at ${price} an hour", dollars(usd)),
        _ => "; `usd_per_hour` in [run] or `--usd-per-hour` gives it in USD".to_owned(),
    };
    let collecting = match (plan.collect_hours(), cost.usd_per_hour) {
        (Some(hours), Some(price)) => format!("; collecting {}", dollars(hours * price)),
        _ => String::new(),
    };
    vec![format!(
        "cost        {} {}-hours to train {} tokens: {} for a million tokens{usd}{collecting}",
        digits(cost.device_hours),
        plan.device,
        large(cost.tokens as u64),
        cost.per_million(&plan.device),
    )]
}
