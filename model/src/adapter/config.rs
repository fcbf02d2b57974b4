//! `adapter_config.json` as PEFT 0.21 reads and writes it.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{AdapterLayers, AdapterPlan};
use crate::Error;
use crate::files::read_text;
use crate::keys::Keys;

/// Keys that change what an adapter computes, or what else is stored, and that are not supported: they must be absent,
/// null, false or empty.
const UNSUPPORTED: [&str; 18] = [
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "velora_config",
    "kasa_config",
    "monteclora_config",
    "corda_config",
    "lora_ga_config",
    "loftq_config",
    "megatron_config",
];

/// Values of `init_lora_weights` with which the weights of the base stay as they are.
const INITIALISATIONS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

const OTHER_ADAPTER: &str = "hint: use a plain LoRA adapter, or merge this one into its model with PEFT (`merge_and_unload`) and use the merged checkpoint";

/// Reads the settings of an adapter from the configuration at `path`. The layers are those of its `target_modules` if that
/// is a list.
///
/// # Errors
/// Returns an error for a file that is no such configuration, and for a key whose value is not supported.
pub(super) fn read(path: &Path) -> Result<AdapterPlan, Error> {
    let text = read_text(path)?;
    let object: Map<String, Value> = serde_json::from_str(&text).map_err(|source| Error::Json {
        path: path.to_path_buf(),
        what: "PEFT configuration",
        source,
    })?;
    let keys = Keys::new(path, &object);
    check_supported(&keys)?;
    let alpha = match keys.get("lora_alpha") {
        Some(_) => keys.number("lora_alpha", 8.0)?,
        None => 8.0,
    };
    let count = |value: &Value| keys.rank(value);
    Ok(AdapterPlan {
        rank: keys.count("r", Some(8))?,
        alpha,
        rslora: keys.flag("use_rslora", false)?,
        targets: targets(&keys)?,
        rank_pattern: pattern(&keys, "rank_pattern", count)?,
        alpha_pattern: pattern(&keys, "alpha_pattern", |value| {
            keys.number_of("alpha_pattern", value)
        })?,
    })
}

impl Keys<'_> {
    fn rank(&self, value: &Value) -> Result<usize, Error> {
        let rank = value.as_u64().and_then(|rank| usize::try_from(rank).ok());
        rank.filter(|rank| *rank > 0).ok_or_else(|| {
            let why = format!("{value} must be a rank, a whole number above 0");
            self.wrong("rank_pattern", why)
        })
    }
}

fn check_supported(keys: &Keys<'_>) -> Result<(), Error> {
    let kind = keys.get("peft_type").and_then(Value::as_str);
    if kind != Some("LORA") {
        let found = keys.get("peft_type").unwrap_or(&Value::Null);
        let why = format!("{found} is not supported, only \"LORA\"\n{OTHER_ADAPTER}");
        return Err(keys.error("peft_type", why));
    }
    for key in UNSUPPORTED {
        let is_set = keys.get(key).is_some_and(|value| match value {
            Value::Bool(set) => *set,
            Value::Array(list) => !list.is_empty(),
            Value::Object(table) => !table.is_empty(),
            _ => true,
        });
        if is_set {
            let value = keys.get(key).unwrap_or(&Value::Null);
            let why = format!("{value} is not supported\n{OTHER_ADAPTER}");
            return Err(keys.error(key, why));
        }
    }
    if let Some(value) = keys.get("bias").filter(|bias| *bias != "none") {
        let why = format!("{value} is not supported, only \"none\"\n{OTHER_ADAPTER}");
        return Err(keys.error("bias", why));
    }
    match keys.get("init_lora_weights") {
        None | Some(Value::Bool(_)) => Ok(()),
        Some(Value::String(name)) if INITIALISATIONS.contains(&name.as_str()) => Ok(()),
        Some(value) => {
            let why = format!(
                "{value} is not supported, because it changes the weights under the adapter\n{OTHER_ADAPTER}"
            );
            Err(keys.error("init_lora_weights", why))
        }
    }
}

/// Reads `target_modules`. Which layers have an adapter follows from the stored tensors, so a regular expression is not
/// looked at.
fn targets(keys: &Keys<'_>) -> Result<AdapterLayers, Error> {
    match keys.get("target_modules") {
        None | Some(Value::String(_)) => Ok(AdapterLayers::AllLinear),
        Some(Value::Array(names)) => {
            let name = |name: &Value| {
                let why = || keys.wrong("target_modules", format!("{name} must be a name"));
                Ok(name.as_str().ok_or_else(why)?.to_owned())
            };
            Ok(AdapterLayers::Named(
                names.iter().map(name).collect::<Result<_, _>>()?,
            ))
        }
        Some(value) => {
            let why = format!("{value} must be a list of names, or a regular expression");
            Err(keys.wrong("target_modules", why))
        }
    }
}

/// Reads a table of values by layer. PEFT takes its keys for regular expressions on the end of a layer's name; names are
/// supported.
fn pattern<T>(
    keys: &Keys<'_>,
    key: &'static str,
    read: impl Fn(&Value) -> Result<T, Error>,
) -> Result<Vec<(String, T)>, Error> {
    let entries = match keys.get(key) {
        None => return Ok(Vec::new()),
        Some(Value::Object(entries)) => entries,
        Some(value) => return Err(keys.wrong(key, format!("{value} must be a table"))),
    };
    let entry = |(name, value): (&String, &Value)| {
        let plain = |c: char| c.is_alphanumeric() || matches!(c, '_' | '.' | '-');
        // A name with escaped dots is the most common expression.
        let name = name.trim_start_matches('^').trim_end_matches('$');
        let name = name.replace("\\.", ".");
        if name.is_empty() || !name.chars().all(plain) {
            let why = format!(
                "{name:?} is a regular expression, and only names of layers are supported\nhint: list the layers by name"
            );
            return Err(keys.error(key, why));
        }
        Ok((name, read(value)?))
    };
    entries.iter().map(entry).collect()
}

/// Makes the configuration of an adapter of `layers`, each with its rank.
pub(super) fn write(
    plan: &AdapterPlan,
    layers: &[String],
    base: &str,
    revision: Option<&str>,
) -> Value {
    let table = |pattern: Map<String, Value>| Value::Object(pattern);
    let ranks = plan.rank_pattern.iter();
    let ranks = ranks.map(|(name, rank)| (name.clone(), json!(rank)));
    let alphas = plan.alpha_pattern.iter();
    let alphas = alphas.map(|(name, alpha)| (name.clone(), number(*alpha)));
    json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": null,
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": true,
        "r": plan.rank,
        "lora_alpha": number(plan.alpha),
        "lora_dropout": 0.0,
        "use_rslora": plan.rslora,
        "use_dora": false,
        "bias": "none",
        "fan_in_fan_out": false,
        "target_modules": layers,
        "exclude_modules": null,
        "modules_to_save": null,
        "layers_to_transform": null,
        "layers_pattern": null,
        "rank_pattern": table(ranks.collect()),
        "alpha_pattern": table(alphas.collect()),
        "init_lora_weights": true,
    })
}

/// Writes a whole number without a decimal point, as PEFT does.
fn number(value: f64) -> Value {
    match value.fract() == 0.0 && value.abs() < 1e15 {
        true => json!(value as i64),
        false => json!(value),
    }
}
