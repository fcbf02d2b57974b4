//! DeepSeek-V2, DeepSeek-V3 and R1: latent attention, routed and shared experts.

use serde_json::json;

use super::{Family, find, layers};
use crate::Error;
use crate::keys::Keys;
use crate::plan::{
    AttentionPlan, DecoderPlan, ExpertsPlan, FeedForwardPlan, GatedPlan, GroupPlan, LatentPlan,
    LayerNorms, LayerPlan, NormPlan, RouterPlan, Scoring,
};
use crate::rotary_table::{RotaryKeys, yarn_magnitude};

/// DeepSeek-V2 and V2-Lite: softmax scores, groups by their best expert.
pub(super) fn v2(keys: &Keys) -> Result<DecoderPlan, Error> {
    keys.only("norm_topk_prob", &[json!(false)])?;
    keys.only("scoring_func", &[json!("softmax")])?;
    keys.only(
        "topk_method",
        &[json!("greedy"), json!("group_limited_greedy")],
    )?;
    let grouped = keys.get("topk_method") == Some(&json!("group_limited_greedy"));
    let router = RouterPlan {
        name: "gate",
        scoring: Scoring::Softmax,
        bias: false,
        correction_bias: false,
        groups: match grouped {
            true => groups(keys, 1)?,
            false => None,
        },
        normalised: false,
        scale: keys.number("routed_scaling_factor", 1.0)?,
    };
    decoder(keys, router, 0)
}

/// DeepSeek-V3 and R1: sigmoid scores, groups by their two best experts, a correction of the choice.
pub(super) fn v3(keys: &Keys) -> Result<DecoderPlan, Error> {
    keys.only("scoring_func", &[json!("sigmoid")])?;
    keys.only("topk_method", &[json!("noaux_tc")])?;
    let router = RouterPlan {
        name: "gate",
        scoring: Scoring::Sigmoid,
        bias: false,
        correction_bias: true,
        groups: groups(keys, 2)?,
        normalised: keys.flag("norm_topk_prob", true)?,
        scale: keys.number("routed_scaling_factor", 2.5)?,
    };
    decoder(keys, router, 3)
}

fn groups(keys: &Keys, summed: usize) -> Result<Option<GroupPlan>, Error> {
    let count = keys.count("n_group", Some(8))?;
    let chosen = keys.count("topk_group", Some(4))?;
    let experts = keys.count("n_routed_experts", Some(256))?;
    if !experts.is_multiple_of(count) || chosen > count || experts / count < summed {
        let why = format!(
            "{experts} experts cannot be divided into {count} groups of which {chosen} are chosen"
        );
        return Err(keys.wrong("n_group", why));
    }
    Ok(Some(GroupPlan {
        count,
        chosen,
        summed,
    }))
}

fn decoder(keys: &Keys, router: RouterPlan, dense_layers: usize) -> Result<DecoderPlan, Error> {
    keys.only("pretraining_tp", &[json!(1)])?;
    keys.only("moe_layer_freq", &[json!(1)])?;
    let family: &Family = find(keys)?;
    let gated = GatedPlan {
        width: keys.count("intermediate_size", None)?,
        activation: keys.activation("hidden_act", "silu")?,
        bias: false,
        fused: false,
    };
    let width = keys.count("moe_intermediate_size", Some(2048))?;
    let shared = keys.index("n_shared_experts", 1)?;
    let experts = FeedForwardPlan::Experts(ExpertsPlan {
        count: keys.count("n_routed_experts", Some(256))?,
        chosen: keys.count("num_experts_per_tok", Some(8))?,
        expert: GatedPlan { width, ..gated },
        shared_width: (shared > 0).then_some(width * shared),
        stacked: false,
        router,
    });
    let rotary = RotaryKeys::find(keys, "full_attention", 10_000.0)?;
    let attention = latent(keys, &rotary)?;
    let dense = keys.index("first_k_dense_replace", dense_layers)?;
    let layer = |index| LayerPlan {
        norms: LayerNorms::BEFORE,
        attention: AttentionPlan::Latent(attention.clone()),
        feed_forward: match index < dense {
            true => FeedForwardPlan::Gated(gated),
            false => experts.clone(),
        },
    };
    Ok(DecoderPlan {
        layers: (0..layers(keys)?).map(layer).collect(),
        rotary: vec![rotary.table(attention.rotary_width, family.context_of(keys)?)?],
        norm: NormPlan {
            epsilon: keys.number("rms_norm_eps", 1e-6)?,
            gain_offset: 0.0,
        },
        embedding_scale: None,
        final_softcap: None,
    })
}

fn latent(keys: &Keys, rotary: &RotaryKeys) -> Result<LatentPlan, Error> {
    let plain_width = keys.count("qk_nope_head_dim", Some(128))?;
    let rotary_width = keys.count("qk_rope_head_dim", Some(64))?;
    if !rotary_width.is_multiple_of(2) {
        let why = format!("{rotary_width} is odd, but rotary positions rotate pairs of numbers");
        return Err(keys.wrong("qk_rope_head_dim", why));
    }
    // YaRN's magnitude of all dimensions is a factor on queries and on keys.
    let magnitude = match (rotary.scaling(), rotary.number("mscale_all_dim")?) {
        ("default", _) | (_, None) => 1.0,
        (_, Some(scale)) => yarn_magnitude(rotary.number("factor")?.unwrap_or(1.0), scale),
    };
    let interleaved = match find(keys)?.model_type {
        "deepseek_v2" => true,
        _ => keys.flag("rope_interleave", true)?,
    };
    Ok(LatentPlan {
        heads: keys.count("num_attention_heads", None)?,
        plain_width,
        rotary_width,
        value_width: keys.count("v_head_dim", Some(128))?,
        key_rank: keys.count("kv_lora_rank", Some(512))?,
        query_rank: keys.optional_count("q_lora_rank")?,
        scale: ((plain_width + rotary_width) as f64).powf(-0.5) * magnitude * magnitude,
        rotary: 0,
        interleaved,
        bias: keys.flag("attention_bias", false)?,
    })
}
