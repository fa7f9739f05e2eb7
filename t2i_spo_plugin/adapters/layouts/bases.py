"""How the transformers of today name their modules: in diffusers, and in their own code, which most trainers follow.

A name is a template: `#` stands for the number of a block, braces for alternatives. Files write it with dots or, as
kohya's do, with underscores for dots, so templates are looked up by the flat form. Where the own code has one layer
for several of diffusers, its rows are theirs, one after the other: each takes its rows of B, and all share A.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache


Rule = tuple[str, tuple[str, ...]]
"""A template and what it is in diffusers, one layer or several side by side."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""What diffusers itself makes of projections when a trainer has it fuse them."""


@dataclass(frozen=True, eq=False)
class Base:
    """The module names of one architecture.

    Attributes:
        architecture: as `AdapterMetadata.base_architecture`.
        diffusers: templates of diffusers' names.
        original: templates of the own code's names, with diffusers' names for each; equal ones are left out.
        swapped: templates of the own code that compute (shift, scale) where diffusers computes (scale, shift).
        ratios: rows by column of the weights that tell this base from others which use the same names.
    """

    architecture: str
    diffusers: tuple[str, ...]
    original: Mapping[str, str] = field(default_factory=dict)
    swapped: tuple[str, ...] = ()
    ratios: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def own_rules(self) -> dict[str, list[Rule]]:
        """The rules for diffusers' names, by flat template."""
        return _by_key((name, (name,)) for template in self.diffusers for name in _expand(template))

    @cached_property
    def fused_rules(self) -> dict[str, list[Rule]]:
        """The rules for projections that diffusers fused."""
        names = {name for template in self.diffusers for name in _expand(template)}
        rules = []
        for parent in sorted({name.rpartition(".")[0] for name in names}):
            for fused, parts in _FUSED.items():
                targets = tuple(f"{parent}.{part}" for part in parts)
                if names.issuperset(targets):
                    rules.append((f"{parent}.{fused}", targets))
        return _by_key(rules)

    @cached_property
    def original_rules(self) -> dict[str, list[Rule]]:
        """The rules for the own code's names."""
        rules = []
        for names, targets in self.original.items():
            expanded = [_expand(target) for target in targets.split()]
            rules += [(name, found) for name, *found in zip(_expand(names), *expanded, strict=True)]
        return _by_key((name, tuple(found)) for name, found in rules)

    def original_name(self, name: str) -> str | None:
        """What the own code calls the module `name`, or None where it is none, or only a part of one, there."""
        component, _, path = name.partition(".")
        target = path if component == "transformer" else f"{component}:{path}"
        key, numbers = _key(target.replace(".", "_"))
        for template, found in self._inverse_rules.get(key, ()):
            wild = _wildcards(template, numbers)
            if wild is not None:
                return _filled(found[0], wild)
        return None

    @cached_property
    def _inverse_rules(self) -> dict[str, list[Rule]]:
        single = [
            (targets[0], (template,))
            for rules in self.original_rules.values()
            for template, targets in rules
            if len(targets) == 1 and template not in self.swapped
        ]
        renamed = {target for target, _ in single}
        same = [rule for rules in self.own_rules.values() for rule in rules if rule[0] not in renamed]
        return _by_key([*single, *same])

    def find(self, flat: str, fused_only: bool = False) -> Rule | None:
        """The template of a flat path and diffusers' names for it, or None when this base has no such module."""
        key, numbers = _key(flat)
        tables = (self.own_rules, self.fused_rules) if fused_only else self._tables
        for table in tables:
            for template, targets in table.get(key, ()):
                wild = _wildcards(template, numbers)
                if wild is not None:
                    return template, tuple(_filled(target, wild) for target in targets)
        return None

    @cached_property
    def ratio_rules(self) -> dict[str, int]:
        """`ratios` by single templates."""
        return {name: ratio for names, ratio in self.ratios.items() for name in _expand(names)}

    @cached_property
    def _tables(self) -> tuple[dict[str, list[Rule]], ...]:
        return self.own_rules, self.original_rules, self.fused_rules


def _expand(template: str) -> list[str]:
    """`a.{b,c}.d` as `a.b.d` and `a.c.d`, the first braces varying slowest."""
    pieces = _BRACES.split(template)
    choices = [piece.split(",") if number % 2 else [piece] for number, piece in enumerate(pieces)]
    return ["".join(parts) for parts in itertools.product(*choices)]


@lru_cache(maxsize=4096)
def _key(flat: str) -> tuple[str, tuple[str, ...]]:
    words = flat.split("_")
    return "_".join("#" if word.isdigit() else word for word in words), tuple(word for word in words if word.isdigit())


def _by_key(rules: Iterable[Rule]) -> dict[str, list[Rule]]:
    table: dict[str, list[Rule]] = {}
    for name, targets in rules:
        table.setdefault(_key(name.replace(".", "_"))[0], []).append((name, targets))
    return table


def _wildcards(template: str, numbers: tuple[str, ...]) -> list[str] | None:
    """The numbers that stand for the template's `#`, or None when another number differs from the template's."""
    places = [word for word in template.replace(".", "_").split("_") if word == "#" or word.isdigit()]
    if any(place not in ("#", number) for place, number in zip(places, numbers, strict=True)):
        return None
    return [number for place, number in zip(places, numbers, strict=True) if place == "#"]


def _filled(target: str, numbers: list[str]) -> str:
    parts = target.split("#")
    if len(parts) - 1 != len(numbers):
        raise ValueError(f"{target} has {len(parts) - 1} numbers, its own name {len(numbers)}")
    return "".join(itertools.chain(*zip(parts, [*numbers, ""], strict=True)))


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
