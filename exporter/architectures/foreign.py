"""Families that kvq does not export, and what it lacks for each: said to whoever offers one of them."""

from __future__ import annotations

EXPERTS, STATES, LATENT = "mixtures of experts", "layers with a recurrent state", "latent attention"
CONVOLUTIONS, CAPS, LAYER_NORM = "convolutions", "soft-capped logits", "layer norms with a mean"
PARALLEL, BOTH_WAYS = "attention and network side by side", "attention in both directions"
IMAGES = "images"
RELATIVE, ABSOLUTE = "relative positions without rotary embedding", "learned positions"
# By model_type of config.json or general.architecture of a GGUF file, without "_", "-" and ".".
MISSING: dict[str, str] = {
    **dict.fromkeys(
        ("mixtral", "qwen2moe", "qwen3moe", "olmoe", "granitemoe", "granitemoeshared", "phimoe", "phi3moe", "dbrx",
         "arctic", "grok", "grok1", "gptoss", "llama4", "llama4text", "ernie45moe", "bailingmoe",
         "hunyuanmoe", "hunyuanv1moe", "smallthinker", "dots1", "minimaxm2", "glm4moe", "afmoe", "deepseek"),
        EXPERTS,
    ),
    **dict.fromkeys(("deepseekv2", "deepseekv3", "deepseek2", "minicpm3", "kimik2", "plm"), LATENT),
    **dict.fromkeys(
        ("mamba", "mamba2", "falconmamba", "falconh1", "jamba", "bamba", "zamba", "zamba2", "rwkv", "rwkv6", "rwkv7",
         "granitemoehybrid", "granitehybrid", "nemotronh", "qwen3next", "qwen35", "qwen35text", "recurrentgemma",
         "plamo2", "kimilinear"),
        STATES,
    ),
    **dict.fromkeys(("gemma3", "mistral3", "qwen2vl", "qwen25vl", "qwen3vl", "idefics3", "llava"), IMAGES),
    **dict.fromkeys(("lfm2", "lfm2moe"), CONVOLUTIONS),
    **dict.fromkeys(("gemma2", "gemma3n", "gemma3ntext"), CAPS),
    **dict.fromkeys(
        ("olmo", "stablelm", "starcoder2", "cohere", "cohere2", "commandr", "nemotron", "stablelmepoch", "persimmon"),
        LAYER_NORM,
    ),
    **dict.fromkeys(("gptneox", "gptj", "falcon", "phi", "phi2", "phimsft"), PARALLEL),
    **dict.fromkeys(("gpt2", "gptbigcode", "starcoder", "opt", "gptneo"), ABSOLUTE),
    **dict.fromkeys(("bloom", "mpt", "baichuan"), RELATIVE),
    **dict.fromkeys(("bert", "roberta", "modernbert", "t5", "umt5", "bart", "nomicbert", "jinabertv2"), BOTH_WAYS),
}  # fmt: skip


def what_is_missing(kind: str) -> str:
    """Words that go behind a family's name where something is known to be missing, else none."""
    missing = MISSING.get(kind.lower().translate(str.maketrans("", "", "_-.")))
    return f", which has {missing} that kvq lacks" if missing else ""
