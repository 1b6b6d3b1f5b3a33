"Small random models of every causal family that the installed `transformers` knows, and why some are missing."
import inspect

import torch

MOST = 4_000_000   # weights
SIZES = {
    32: "hidden_size d_model n_embd dim emb_dim word_embed_proj_dim embedding_size lru_width sliding_window",
    2: "num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers num_key_value_heads num_experts_per_tok linear_num_key_heads linear_num_value_heads",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts num_local_experts n_routed_experts qk_rope_head_dim qk_nope_head_dim rotary_dim",
    8: "head_dim v_head_dim qk_head_dim mamba_n_heads mamba_d_head mamba_d_state mamba_num_heads mamba_head_dim ssm_state_size state_size linear_key_head_dim linear_value_head_dim",
    16: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size q_lora_rank kv_lora_rank",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size n_inner d_inner dff d_ff",
    64: "max_position_embeddings n_positions max_seq_len",
    128: "vocab_size n_words",
    1: "n_group topk_group first_k_dense_replace mamba_n_groups n_groups bos_token_id",
    0: "pad_token_id",
}
SIZE_OF = {name: size for size, names in SIZES.items() for name in names.split()} | dict(eos_token_id=2)
SPARSE = dict(index_topk=4, index_n_heads=2, index_head_dim=8, head_dim=4, num_key_value_heads=4)
MORE = dict(   # what else a family needs
    dots1=dict(n_shared_experts=1), falcon_h1=dict(mamba_d_ssm=64), mamba2=dict(num_heads=8), zaya=dict(num_experts_per_tok=1), xlm=dict(causal=True),
    gpt_neo=dict(attention_types=[[["global", "local"], 1]]), lfm2_moe=dict(layer_types=["conv", "full_attention"]),
    gemma3n_text=dict(num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"], vocab_size_per_layer_input=128, hidden_size_per_layer_input=8),
    gemma4_text=dict(vocab_size_per_layer_input=128, hidden_size_per_layer_input=8), dots3_note_text=dict(num_key_value_heads=4),
    reformer=dict(is_decoder=True, axial_pos_embds=False, attn_layers=["local", "local"], attention_head_size=8, feed_forward_size=48),
    roc_bert=dict(pronunciation_vocab_size=32, shape_vocab_size=32, pronunciation_embed_dim=8, shape_embed_dim=8, is_decoder=True),
    longcat_flash=dict(head_dim=4, moe_topk=2, expert_ffn_hidden_size=16, zero_expert_num=2), zamba2=dict(num_hidden_layers=3, layers_block_type=["linear_attention", "hybrid", "linear_attention"]),
    xmod=dict(default_language="en_XX", is_decoder=True), granite=dict(residual_multiplier=.22), granitemoe=dict(residual_multiplier=.4),
    deepseek_v32=SPARSE, axk2=SPARSE, glm_moe_dsa=SPARSE)
DECODERS = "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta roberta-prelayernorm roformer xlm-roberta xlm-roberta-xl prophetnet".split()
MORE |= {name: dict(is_decoder=True) for name in DECODERS}
SENSES = "its configuration is one of several models; the text half is a family of its own or not made for text alone"
MISSING = {name: SENSES for name in "dots3_note emu3 fuyu gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified gemma4_unified_assistant git got_ocr2 llama4 mllama moss_transcribe_diarize musicgen musicgen_melody phi4_multimodal qwen3_5 qwen3_5_moe qwen4_exp".split()}
MISSING |= dict(blt="patches of bytes, by a second model", cohere_compass_text="its rotary settings need one entry a kind of layer", dbrx="its default configuration is incomplete",
                inkling2_loop_text="no small size by a setting", inkling2_text="no small size by a setting", kimi_linear="one pass takes half a minute on a CPU", zamba="its tied weights name layers that a small one lacks")


def names():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def config(name, **more):
    "A small configuration of that family."
    from transformers import CONFIG_MAPPING
    kind = CONFIG_MAPPING[name]
    known = {*inspect.signature(kind.__init__).parameters, *getattr(kind, "__dataclass_fields__", ())}
    return kind(**{k: v for k, v in SIZE_OF.items() if k in known} | MORE.get(name, {}) | more)


def tiny(name, **more):
    "A small random model of that family; an error where there is none."
    from transformers import AutoModelForCausalLM
    settings = config(name, **more)
    with torch.device("meta"): weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(settings).parameters())
    if weights > MOST: raise ValueError(f"{weights:,} weights")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings).float().eval().requires_grad_(False)
    for p in model.parameters():
        if p.ndim > 1: p.normal_(std=.2)
        else: p.add_(torch.randn_like(p), alpha=.1)
    return model
