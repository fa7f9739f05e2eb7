"""How the transformers of today name their modules: in diffusers, and in their own code, which most trainers follow.

Templates are explained in `templates.py`.
"""

from __future__ import annotations

from .templates import Base


_QKVO = "{to_q,to_k,to_v,to_out.0}"
_JOINT = "transformer_blocks.#.attn.{to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out}"
_TIME = "time_text_embed.{timestep_embedder,text_embedder}.{linear_1,linear_2}"
_REFINED = "{layers,noise_refiner,context_refiner}.#"
_FLUX_BLOCKS = {
    "double_blocks.#.{img,txt}_attn.qkv": (
        "transformer_blocks.#.attn.{to_q,add_q_proj} transformer_blocks.#.attn.{to_k,add_k_proj} "
        "transformer_blocks.#.attn.{to_v,add_v_proj}"
    ),
    "double_blocks.#.{img,txt}_attn.proj": "transformer_blocks.#.attn.{to_out.0,to_add_out}",
}
_FLUX_1_BLOCKS = _FLUX_BLOCKS | {
    "double_blocks.#.{img,txt}_mlp.{0,2}": "transformer_blocks.#.{ff,ff_context}.{net.0.proj,net.2}",
    "single_blocks.#.linear1": (
        "single_transformer_blocks.#.attn.to_q single_transformer_blocks.#.attn.to_k "
        "single_transformer_blocks.#.attn.to_v single_transformer_blocks.#.proj_mlp"
    ),
    "single_blocks.#.linear2": "single_transformer_blocks.#.proj_out",
    "{img_in,txt_in,final_layer.linear}": "{x_embedder,context_embedder,proj_out}",
}
_FLUX_1_MODULES = (
    _JOINT,
    "transformer_blocks.#.{ff,ff_context}.{net.0.proj,net.2}",
    "single_transformer_blocks.#.{attn.to_q,attn.to_k,attn.to_v,proj_mlp,proj_out}",
    "{x_embedder,context_embedder,proj_out}",
)
_FLUX_1_RATIOS = {"single_blocks.#.linear1": 7, "double_blocks.#.img_mlp.0": 4, "double_blocks.#.txt_mlp.0": 4}
_SHIFT_AND_SCALE = "final_layer.adaLN_modulation.1"

FLUX_1 = Base(
    "flux-1-dev",
    (
        *_FLUX_1_MODULES,
        "transformer_blocks.#.{norm1,norm1_context}.linear",
        "single_transformer_blocks.#.norm.linear",
        "time_text_embed.{timestep_embedder,text_embedder,guidance_embedder}.{linear_1,linear_2}",
        "norm_out.linear",
    ),
    _FLUX_1_BLOCKS
    | {
        "double_blocks.#.{img,txt}_mod.lin": "transformer_blocks.#.{norm1,norm1_context}.linear",
        "single_blocks.#.modulation.lin": "single_transformer_blocks.#.norm.linear",
        "{time_in,vector_in,guidance_in}.{in_layer,out_layer}": (
            "time_text_embed.{timestep_embedder,text_embedder,guidance_embedder}.{linear_1,linear_2}"
        ),
        _SHIFT_AND_SCALE: "norm_out.linear",
    },
    (_SHIFT_AND_SCALE,),
    _FLUX_1_RATIOS,
)
CHROMA = Base(
    "chroma",
    (*_FLUX_1_MODULES, "distilled_guidance_layer.{in_proj,out_proj,layers.#.linear_1,layers.#.linear_2}"),
    _FLUX_1_BLOCKS
    | {
        "distilled_guidance_layer.layers.#.{in_layer,out_layer}": (
            "distilled_guidance_layer.layers.#.{linear_1,linear_2}"
        )
    },
    ratios=_FLUX_1_RATIOS,
)
FLUX_2 = Base(
    "flux-2",
    (
        _JOINT,
        "transformer_blocks.#.{ff,ff_context}.{linear_in,linear_out}",
        "single_transformer_blocks.#.attn.{to_qkv_mlp_proj,to_out}",
        "time_guidance_embed.{timestep_embedder,guidance_embedder}.{linear_1,linear_2}",
        "{double_stream_modulation_img,double_stream_modulation_txt,single_stream_modulation}.linear",
        "{x_embedder,context_embedder,proj_out,norm_out.linear}",
    ),
    _FLUX_BLOCKS
    | {
        "double_blocks.#.{img,txt}_mlp.{0,2}": "transformer_blocks.#.{ff,ff_context}.{linear_in,linear_out}",
        "single_blocks.#.{linear1,linear2}": "single_transformer_blocks.#.attn.{to_qkv_mlp_proj,to_out}",
        "{time_in,guidance_in}.{in_layer,out_layer}": (
            "time_guidance_embed.{timestep_embedder,guidance_embedder}.{linear_1,linear_2}"
        ),
        "{double_stream_modulation_img,double_stream_modulation_txt,single_stream_modulation}.lin": (
            "{double_stream_modulation_img,double_stream_modulation_txt,single_stream_modulation}.linear"
        ),
        "{img_in,txt_in,final_layer.linear}": "{x_embedder,context_embedder,proj_out}",
        _SHIFT_AND_SCALE: "norm_out.linear",
    },
    (_SHIFT_AND_SCALE,),
    {"single_blocks.#.linear1": 9, "double_blocks.#.img_mlp.0": 6, "double_blocks.#.txt_mlp.0": 6},
)
SD_3 = Base(
    "stable-diffusion-3",
    (
        _JOINT,
        f"transformer_blocks.#.attn2.{_QKVO}",
        "transformer_blocks.#.{ff,ff_context}.{net.0.proj,net.2}",
        "transformer_blocks.#.{norm1,norm1_context}.linear",
        _TIME,
        "{pos_embed.proj,context_embedder,norm_out.linear,proj_out}",
    ),
    {
        "joint_blocks.#.{x_block,context_block}.attn.qkv": _FLUX_BLOCKS["double_blocks.#.{img,txt}_attn.qkv"],
        "joint_blocks.#.{x_block,context_block}.attn.proj": "transformer_blocks.#.attn.{to_out.0,to_add_out}",
        "joint_blocks.#.x_block.attn2.qkv": (
            "transformer_blocks.#.attn2.to_q transformer_blocks.#.attn2.to_k transformer_blocks.#.attn2.to_v"
        ),
        "joint_blocks.#.x_block.attn2.proj": "transformer_blocks.#.attn2.to_out.0",
        "joint_blocks.#.{x_block,context_block}.mlp.{fc1,fc2}": (
            "transformer_blocks.#.{ff,ff_context}.{net.0.proj,net.2}"
        ),
        "joint_blocks.#.{x_block,context_block}.adaLN_modulation.1": (
            "transformer_blocks.#.{norm1,norm1_context}.linear"
        ),
        "{t_embedder,y_embedder}.mlp.{0,2}": _TIME,
        "{x_embedder.proj,final_layer.linear}": "{pos_embed.proj,proj_out}",
        _SHIFT_AND_SCALE: "norm_out.linear",
    },
    # Of the text's last block only shift and scale are left.
    (_SHIFT_AND_SCALE, "joint_blocks.#.context_block.adaLN_modulation.1"),
)
Z_IMAGE = Base(
    "zimage",
    (
        f"{_REFINED}.attention.{_QKVO}",
        f"{_REFINED}.feed_forward.{{w1,w2,w3}}",
        "{layers,noise_refiner}.#.adaLN_modulation.0",
        "{all_x_embedder.2-1,all_final_layer.2-1.linear,all_final_layer.2-1.adaLN_modulation.1}",
        "{t_embedder.mlp.0,t_embedder.mlp.2,cap_embedder.1}",
    ),
    {
        f"{_REFINED}.attention.qkv": " ".join(f"{_REFINED}.attention.{name}" for name in ("to_q", "to_k", "to_v")),
        f"{_REFINED}.attention.out": f"{_REFINED}.attention.to_out.0",
        "{x_embedder,final_layer.linear,final_layer.adaLN_modulation.1}": (
            "{all_x_embedder.2-1,all_final_layer.2-1.linear,all_final_layer.2-1.adaLN_modulation.1}"
        ),
    },
    ratios={f"{_REFINED}.attention.qkv": 3},
)
LUMINA_2 = Base(
    "lumina2",
    (
        f"{_REFINED}.attn.{_QKVO}",
        f"{_REFINED}.feed_forward.{{linear_1,linear_2,linear_3}}",
        "{layers,noise_refiner}.#.norm1.linear",
        "time_caption_embed.{timestep_embedder.linear_1,timestep_embedder.linear_2,caption_embedder.1}",
        "{x_embedder,norm_out.linear_1,norm_out.linear_2}",
    ),
    {
        f"{_REFINED}.attention.qkv": " ".join(f"{_REFINED}.attn.{name}" for name in ("to_q", "to_k", "to_v")),
        f"{_REFINED}.attention.out": f"{_REFINED}.attn.to_out.0",
        f"{_REFINED}.feed_forward.{{w1,w2,w3}}": f"{_REFINED}.feed_forward.{{linear_1,linear_2,linear_3}}",
        "{layers,noise_refiner}.#.adaLN_modulation.1": "{layers,noise_refiner}.#.norm1.linear",
        "{t_embedder.mlp.0,t_embedder.mlp.2,cap_embedder.1}": (
            "time_caption_embed.{timestep_embedder.linear_1,timestep_embedder.linear_2,caption_embedder.1}"
        ),
        "{final_layer.adaLN_modulation.1,final_layer.linear}": "{norm_out.linear_1,norm_out.linear_2}",
    },
)
QWEN_IMAGE = Base(
    "qwen-image",
    (
        _JOINT,
        "transformer_blocks.#.{img_mlp,txt_mlp}.{net.0.proj,net.2}",
        "transformer_blocks.#.{img_mod,txt_mod}.1",
        "time_text_embed.timestep_embedder.{linear_1,linear_2}",
        "{img_in,txt_in,norm_out.linear,proj_out}",
    ),
)
KREA_2 = Base(
    "krea2",
    (
        "{transformer_blocks,text_fusion.layerwise_blocks,text_fusion.refiner_blocks}.#"
        ".{attn.to_q,attn.to_k,attn.to_v,attn.to_gate,attn.to_out.0,ff.gate,ff.up,ff.down}",
        "{time_embed,txt_in}.{linear_1,linear_2}",
        "{img_in,time_mod_proj,text_fusion.projector,final_layer.linear}",
    ),
    {
        "{blocks,txtfusion.layerwise_blocks,txtfusion.refiner_blocks}.#"
        ".{attn.wq,attn.wk,attn.wv,attn.gate,attn.wo,mlp.gate,mlp.up,mlp.down}": (
            "{transformer_blocks,text_fusion.layerwise_blocks,text_fusion.refiner_blocks}.#"
            ".{attn.to_q,attn.to_k,attn.to_v,attn.to_gate,attn.to_out.0,ff.gate,ff.up,ff.down}"
        ),
        "{tmlp.0,tmlp.2,txtmlp.1,txtmlp.3}": "{time_embed,txt_in}.{linear_1,linear_2}",
        "{first,tproj.1,txtfusion.projector,last.linear}": (
            "{img_in,time_mod_proj,text_fusion.projector,final_layer.linear}"
        ),
    },
)
COSMOS = Base(
    "cosmos",
    (
        f"transformer_blocks.#.{{attn1,attn2}}.{_QKVO}",
        "transformer_blocks.#.{norm1,norm2,norm3}.{linear_1,linear_2}",
        "transformer_blocks.#.ff.{net.0.proj,net.2}",
        "time_embed.t_embedder.{linear_1,linear_2}",
        "{patch_embed.proj,norm_out.linear_1,norm_out.linear_2,proj_out,crossattn_proj.0}",
    ),
    {
        "blocks.#.{self_attn,cross_attn}.{q_proj,k_proj,v_proj,output_proj}": (
            f"transformer_blocks.#.{{attn1,attn2}}.{_QKVO}"
        ),
        "blocks.#.adaln_modulation_{self_attn,cross_attn,mlp}.{1,2}": (
            "transformer_blocks.#.{norm1,norm2,norm3}.{linear_1,linear_2}"
        ),
        "blocks.#.mlp.{layer1,layer2}": "transformer_blocks.#.ff.{net.0.proj,net.2}",
        "t_embedder.1.{linear_1,linear_2}": "time_embed.t_embedder.{linear_1,linear_2}",
        "{x_embedder.proj.1,final_layer.adaln_modulation.1,final_layer.adaln_modulation.2,final_layer.linear}": (
            "{patch_embed.proj,norm_out.linear_1,norm_out.linear_2,proj_out}"
        ),
        # Anima's text conditioner is a component of its own in diffusers.
        "llm_adapter.blocks.#.{self_attn,cross_attn}.{q_proj,k_proj,v_proj,o_proj}": (
            "text_conditioner:blocks.#.{self_attn,cross_attn}.{q_proj,k_proj,v_proj,o_proj}"
        ),
        "llm_adapter.blocks.#.mlp.{0,2}": "text_conditioner:blocks.#.mlp.{0,2}",
        "llm_adapter.{in_proj,out_proj}": "text_conditioner:{in_proj,out_proj}",
    },
)
HIDREAM = Base(
    "hi-dream-image",
    (
        "{double_stream_blocks,single_stream_blocks}.#.block.{adaLN_modulation.1,attn1.to_q,attn1.to_k,attn1.to_v,"
        "attn1.to_out,attn1.to_q_t,attn1.to_k_t,attn1.to_v_t,attn1.to_out_t}",
        "{double_stream_blocks,single_stream_blocks}.#.block.{ff_i,ff_t,ff_i.shared_experts}.{w1,w2,w3}",
        "{double_stream_blocks,single_stream_blocks}.#.block.ff_i.experts.#.{w1,w2,w3}",
        "{t_embedder.timestep_embedder,p_embedder.pooled_embedder}.{linear_1,linear_2}",
        "{x_embedder.proj,final_layer.linear,final_layer.adaLN_modulation.1,caption_projection.#.linear}",
    ),
)
ERNIE = Base(
    "ernie-image",
    (
        f"layers.#.self_attention.{_QKVO}",
        "layers.#.mlp.{gate_proj,up_proj,linear_fc2}",
        "time_embedding.{linear_1,linear_2}",
        "{x_embedder.proj,text_proj,adaLN_modulation.1,final_norm.linear,final_linear}",
    ),
)
WAN = Base(
    "wan",
    (
        f"blocks.#.{{attn1,attn2}}.{_QKVO}",
        "blocks.#.attn2.{add_k_proj,add_v_proj}",
        "blocks.#.ffn.{net.0.proj,net.2}",
        "condition_embedder.{time_embedder,text_embedder}.{linear_1,linear_2}",
        "condition_embedder.image_embedder.ff.{net.0.proj,net.2}",
        "{condition_embedder.time_proj,patch_embedding,proj_out}",
    ),
    {
        "blocks.#.{self_attn,cross_attn}.{q,k,v,o}": f"blocks.#.{{attn1,attn2}}.{_QKVO}",
        "blocks.#.cross_attn.{k_img,v_img}": "blocks.#.attn2.{add_k_proj,add_v_proj}",
        "blocks.#.ffn.{0,2}": "blocks.#.ffn.{net.0.proj,net.2}",
        "{time_embedding,text_embedding}.{0,2}": (
            "condition_embedder.{time_embedder,text_embedder}.{linear_1,linear_2}"
        ),
        "img_emb.proj.{1,3}": "condition_embedder.image_embedder.ff.{net.0.proj,net.2}",
        "{time_projection.1,head.head}": "{condition_embedder.time_proj,proj_out}",
    },
)
LTX = Base(
    "ltxvideo",
    (
        f"transformer_blocks.#.{{attn1,attn2}}.{_QKVO}",
        "transformer_blocks.#.ff.{net.0.proj,net.2}",
        "time_embed.{emb.timestep_embedder.linear_1,emb.timestep_embedder.linear_2,linear}",
        "caption_projection.{linear_1,linear_2}",
        "{proj_in,proj_out}",
    ),
    {
        "adaln_single.{emb.timestep_embedder.linear_1,emb.timestep_embedder.linear_2,linear}": (
            "time_embed.{emb.timestep_embedder.linear_1,emb.timestep_embedder.linear_2,linear}"
        ),
        "patchify_proj": "proj_in",
    },
)

BASES = (
    FLUX_1,
    CHROMA,
    FLUX_2,
    SD_3,
    Z_IMAGE,
    LUMINA_2,
    QWEN_IMAGE,
    KREA_2,
    COSMOS,
    HIDREAM,
    ERNIE,
    WAN,
    LTX,
)
"""Where a file fits several of them alike and nothing tells which it is, it is read as the first."""
