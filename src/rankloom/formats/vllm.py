"""What vLLM serves with LoRA: facts of its table of models (vllm-project/vllm, docs/models/supported_models.md)."""

from __future__ import annotations

KINDS = frozenset({"embedding", "linear"})
"""Kinds of layers whose factors it reads."""
CAUSAL = (
    "Cohere Cohere2 Cohere2Moe Cwm Deepseek DeepseekV2 DeepseekV3 DeepseekV32 DotsOCR Ernie4_5 Ernie4_5_Moe Exaone "
    "Exaone4 FalconH1 GPTBigCode Gemma Gemma2 Gemma3 Gemma4 Glm Glm4 Glm4Moe Glm4MoeLite GlmMoeDsa GptOss Granite "
    "GraniteMoe GraniteMoeHybrid GraniteMoeShared HunYuanDenseV1 HunYuanMoEV1 InternLM2 InternLM3 Jamba Lfm2 Lfm2Moe "
    "Llama MiMo MiniCPM MiniCPM3 MiniMaxM2 Mistral Mixtral Nemotron NemotronH OPT Olmo Olmo2 Olmo3 OlmoHybrid Phi Phi3 "
    "PhiMoE Phimoe Qwen2 Qwen2Moe Qwen3 Qwen3Moe Qwen3Next SeedOss SmolLM3 Solar Starcoder2 VaultGemma"
)
SERVED = frozenset(f"{name}ForCausalLM" for name in CAUSAL.split())
"""Classes of transformers that it serves with adapters."""
