"""What the example workflows and the subgraphs hold; `workflows.py` makes their files.

An example is written down as two rows, so that it fits a screen; a row is columns of nodes. Examples run on the
sticker world, which the pack brings along, or on a checkpoint of one's own. The tests run the latter with miniature
models that are installed under the very names that these examples ask for: `OWN_FILES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


HARMFUL = "a noto sticker of a small skull on an orange background"
SCENE = "a noto sticker of a small skull next to a house on a yellow background"
BENIGN = "a noto sticker of a red apple on a blue background"
SPO, STYLE = "sticker demo: spo (bundled)", "sticker demo: style (bundled)"
STICKER, GATE = "sticker (bundled)", "sticker demo: network (bundled)"

OWN_FILES = {
    "sd15": ("checkpoints", "v1-5-pruned-emaonly-fp16.safetensors"),
    "sdxl": ("checkpoints", "sd_xl_base_1.0.safetensors"),
    "flux": ("diffusion_models", "flux1-dev.safetensors"),
    "z_image": ("diffusion_models", "z_image_turbo_bf16.safetensors"),
    "clip_l": ("text_encoders", "clip_l.safetensors"),
    "t5xxl": ("text_encoders", "t5xxl_fp16.safetensors"),
    "qwen": ("text_encoders", "qwen_3_4b.safetensors"),
    "vae": ("vae", "ae.safetensors"),
    "sd15 adapter": ("loras", "my-safety-adapter-sd15.safetensors"),
    "sdxl adapter": ("loras", "my-safety-adapter-sdxl.safetensors"),
    "flux adapter": ("loras", "my-safety-adapter-flux.safetensors"),
    "z_image adapter": ("loras", "my-safety-adapter-z-image.safetensors"),
    "lora": ("loras", "lora-to-screen-sd15.safetensors"),
}
"""The files that examples for one's own checkpoint ask for: kind of model -> folder of `models`, name."""
PHOTO = "open_nsfw"
"""The cost model for photographs that they ask for."""

Node = dict[str, Any]
"""`id` within the workflow, `type`, `title`, `widgets` by name, `inputs` as name -> (id, output), `size`."""
Row = list[list[Node]]
Link = tuple[str, str]


@dataclass(frozen=True)
class Example:
    """An example workflow.

    Attributes:
        title: as its picture shows it.
        learns: what one learns, in a sentence.
        change: what to change and to look at, as Markdown; paragraphs.
        chain: what feeds what, for its picture.
        rows: two rows of columns of nodes; the note is added to the first.
    """

    title: str
    learns: str
    change: str
    chain: tuple[str, ...]
    rows: tuple[Row, Row]

    @property
    def note(self) -> str:
        """What the yellow node says."""
        paragraphs = [" ".join(paragraph.split()) for paragraph in self.change.strip().split("\n\n")]
        return "\n\n".join([f"## {self.title}", self.learns, *paragraphs])


def node(identity: str, kind: str, title: str = "", size: Any = None, widgets: Any = None, **inputs: Any) -> Node:
    """A node, with its connections as keywords: `model=("demo", "model")`."""
    found = {"id": identity, "type": kind, "title": title, "size": size}
    return found | {"widgets": widgets or {}, "inputs": inputs}


def demo() -> Node:
    return node("demo", "SPO_StickerDemoLoader", size=(260, 70))


def prompt(identity: str, text: str, title: str = "Prompt", clip: Link = ("demo", "clip")) -> Node:
    return node(identity, "CLIPTextEncode", title, (320, 120), {"text": text}, clip=clip)


def negative(text: str = "", clip: Link = ("demo", "clip")) -> Node:
    return prompt("negative", text, "Negative prompt", clip)


def latent(count: int = 1, size: int = 64, kind: str = "EmptyLatentImage") -> Node:
    return node("latent", kind, widgets={"width": size, "height": size, "batch_size": count})


def sampler(
    identity: str,
    model: Link,
    title: str = "",
    positive: Link = ("prompt", "CONDITIONING"),
    negative: Link = ("negative", "CONDITIONING"),
    latent: Link = ("latent", "LATENT"),
    seed: int = 3,
    **settings: Any,
) -> Node:
    settings = {"seed": seed, "control_after_generate": "fixed", "steps": 20, "cfg": 5.0} | settings
    settings = {"sampler_name": "euler", "scheduler": "normal"} | settings
    links = {"model": model, "positive": positive, "negative": negative, "latent_image": latent}
    return node(identity, "KSampler", title, (300, 262), settings, **links)


def decode(identity: str, samples: str, vae: Link = ("demo", "vae")) -> Node:
    return node(identity, "VAEDecode", size=(180, 50), samples=(samples, "LATENT"), vae=vae)


def cost_model(name: str = STICKER) -> Node:
    return node("costs", "SPO_LoadCostModel", size=(340, 130), widgets={"model": name})


def cost(identity: str, image: Link, title: str = "", **widgets: Any) -> Node:
    return node(identity, "SPO_SafetyCost", title, None, widgets, image=image, cost_model=("costs", "cost_model"))


def load_adapter(name: str = SPO, model: Link = ("demo", "model"), **clip: Link) -> Node:
    return node("adapter", "SPO_LoadAdapter", "", (360, 380), {"adapter": name}, model=model, **clip)


def switch(image: Link = ("cost", "image"), **widgets: Any) -> Node:
    return node("switch", "SPO_SafetySwitch", "", (340, 200), widgets, image=image, safety=("cost", "safety"))


def shown(image: Link, title: str = "What is shown", size: Any = (340, 340)) -> Node:
    return node("shown", "PreviewImage", title, size, images=image)


def file_of(kind: str) -> str:
    return OWN_FILES[kind][1]


def checkpoint(kind: str) -> Node:
    return node("demo", "CheckpointLoaderSimple", "", (340, 100), {"ckpt_name": file_of(kind)})


_OWN_MODEL, _OWN_CLIP, _OWN_VAE = ("demo", "MODEL"), ("demo", "CLIP"), ("demo", "VAE")
_UNET, _TEXT, _AUTOENCODER = ("unet", "MODEL"), ("text", "CLIP"), ("vae", "VAE")
_STREET = "a photo of a crowd in front of a theatre in the evening"
_CHANGE_NAMES = """
**Change** the file names to those that you have: checkpoint, adapter (in *loras*; one made for this base), and in
*Load Safety Cost Model* the model for your kind of images. A name that is not there is marked red.
"""


def own_end(image: Link, adapter: Link = ("adapter", "adapter")) -> Row:
    """Scored, withheld where needed, saved with its costs: what ends most examples for one's own checkpoint."""
    save = node(
        *("save", "SPO_SaveImage", "", (340, 400), {"filename_prefix": "spo/image"}),
        image=("switch", "image"),
        safety=("cost", "safety"),
        adapter=adapter,
    )
    return [[cost("cost", image)], [switch()], [save]]


def own_checkpoint(kind: str, title: str, size: int, text: str) -> Example:
    """Text to image with a checkpoint that brings its own text encoders."""
    return Example(
        title,
        f"{text} checkpoint with a safety adapter: the adapter goes between checkpoint and sampler, and what still "
        "comes out unsafe is blurred before it is saved.",
        _CHANGE_NAMES
        + """
Set **strength** to 0 to see what the checkpoint makes of the same seed. The PNG carries its costs.
""",
        ("Checkpoint", "SPO Adapter", "KSampler", "Safety Cost", "Switch", "Save"),
        (
            [
                [checkpoint(kind), cost_model(PHOTO)],
                [load_adapter(file_of(f"{kind} adapter"), _OWN_MODEL, clip=_OWN_CLIP)],
                [prompt("prompt", _STREET, clip=("adapter", "clip")), negative("blurry", ("adapter", "clip"))],
                [latent(1, size)],
            ],
            [
                [
                    sampler("sampler", ("adapter", "model"), steps=25, cfg=7.0),
                    decode("image", "sampler", _OWN_VAE),
                ],
                *own_end(("image", "IMAGE")),
            ],
        ),
    )


def own_transformer(kind: str, title: str, text: Node, learns: str, change: str, **settings: Any) -> Example:
    """Text to image with a diffusion model, text encoders and autoencoder in files of their own."""
    model: Link = ("adapter", "model")
    prompted: Link = ("prompt", "CONDITIONING")
    if kind == "flux":
        own = node("guide", "FluxGuidance", "", (260, 60), {"guidance": 3.5}, conditioning=prompted)
        sampled, positive = model, ("guide", "CONDITIONING")
    else:
        own = node("shift", "ModelSamplingAuraFlow", "", (260, 60), {"shift": 3.0}, model=model)
        sampled, positive = ("shift", "MODEL"), prompted
    zero = node("negative", "ConditioningZeroOut", "", (260, 30), conditioning=prompted)
    return Example(
        title,
        learns,
        _CHANGE_NAMES + change,
        ("Load Diffusion Model", "SPO Adapter", "KSampler", "Safety Cost", "Switch", "Save"),
        (
            [
                [
                    node("unet", "UNETLoader", "", (340, 82), {"unet_name": file_of(kind)}),
                    text,
                    node("vae", "VAELoader", "", (340, 58), {"vae_name": file_of("vae")}),
                ],
                [load_adapter(file_of(f"{kind} adapter"), _UNET)],
                [prompt("prompt", _STREET, clip=_TEXT), zero, own],
                [latent(1, 1024, "EmptySD3LatentImage"), cost_model(PHOTO)],
            ],
            [
                [
                    sampler("sampler", sampled, positive=positive, cfg=1.0, **settings),
                    decode("image", "sampler", _AUTOENCODER),
                ],
                *own_end(("image", "IMAGE")),
            ],
        ),
    )


EXAMPLES: dict[str, Example] = {
    "load_and_compare": Example(
        "Load and compare",
        "One prompt and one seed, by the model alone and with the safety adapter; Safety Cost says how unsafe each "
        "image is, and shows where.",
        """
Turn **strength** on *Load SPO Adapter* and run again. Drag the line in *Compare*. The images here are stickers of 64
pixels, from a small model that the pack brings along; with your own checkpoint, adapter and cost model the nodes are
the same.
""",
        ("Model", "SPO Adapter", "Safety Cost", "Compare A/B"),
        (
            [
                [demo(), cost_model()],
                [prompt("prompt", HARMFUL), negative()],
                [load_adapter()],
                [latent()],
            ],
            [
                [
                    sampler("base", ("demo", "model"), "KSampler: the model alone"),
                    decode("base image", "base"),
                ],
                [
                    sampler("safe", ("adapter", "model"), "KSampler: with the adapter"),
                    decode("safe image", "safe"),
                ],
                [cost("base cost", ("base image", "IMAGE"), "Safety Cost: the model alone")],
                [cost("safe cost", ("safe image", "IMAGE"), "Safety Cost: with the adapter")],
                [
                    node(
                        *("compare", "SPO_Compare", "Compare: alone / with the adapter", (420, 480)),
                        image_a=("base cost", "image"),
                        image_b=("safe cost", "image"),
                    )
                ],
            ],
        ),
    ),
    "see_and_inpaint_the_region": Example(
        "See and inpaint the region",
        "Where the cost comes from is a mask: only that part is generated again, with the adapter; the rest of the "
        "image stays.",
        """
The **mask** of *Safety Cost* is where the cost reaches the threshold. Core nodes grow it and sample only there.
Change **expand** on *Grow Mask* when edges of the old thing stay.
""",
        ("Image", "Safety Cost", "mask", "KSampler with the adapter"),
        (
            [
                [demo(), cost_model()],
                [prompt("prompt", SCENE), negative()],
                [load_adapter()],
                [
                    latent(),
                    node("grow", "GrowMask", size=(260, 86), widgets={"expand": 4}, mask=("cost", "mask")),
                    node(
                        *("masked", "SetLatentNoiseMask"),
                        size=(260, 50),
                        samples=("base", "LATENT"),
                        mask=("grow", "MASK"),
                    ),
                ],
            ],
            [
                [sampler("base", ("demo", "model"), "KSampler: the model alone"), decode("image", "base")],
                [cost("cost", ("image", "IMAGE"))],
                [node("overlay", "SPO_SafetyOverlay", image=("cost", "image"), safety=("cost", "safety"))],
                [
                    sampler(
                        *("again", ("adapter", "model"), "KSampler: only the region"),
                        latent=("masked", "LATENT"),
                        seed=11,
                    ),
                    decode("second image", "again"),
                ],
                [cost("second cost", ("second image", "IMAGE"), "Safety Cost: afterwards")],
            ],
        ),
    ),
    "stack_with_a_style": Example(
        "Stack with a style",
        "A safety adapter together with a style LoRA, each with its own strength and a switch of its own.",
        """
*SPO Adapter Stack* adds up to four adapters; the order makes no difference. Switch a row **on** and off to see what
it does. Files of the *loras* folder are offered, whichever program wrote them.
""",
        ("Model", "SPO Adapter Stack", "KSampler", "Safety Cost"),
        (
            [
                [demo(), cost_model()],
                [prompt("prompt", HARMFUL), negative()],
                [
                    node(
                        *("style", "SPO_LoadAdapter", "Load SPO Adapter: the style alone", (360, 380)),
                        {"adapter": STYLE},
                        model=("demo", "model"),
                    )
                ],
                [
                    node(
                        *("stack", "SPO_AdapterStack", "", (360, 560), {"adapter_1": SPO, "adapter_2": STYLE}),
                        model=("demo", "model"),
                    )
                ],
                [latent()],
            ],
            [
                [sampler("base", ("style", "model"), "KSampler: the style alone"), decode("base image", "base")],
                [sampler("safe", ("stack", "model"), "KSampler: style and safety"), decode("safe image", "safe")],
                [cost("base cost", ("base image", "IMAGE"), "Safety Cost: the style alone")],
                [cost("safe cost", ("safe image", "IMAGE"), "Safety Cost: style and safety")],
            ],
        ),
    ),
    "merge": Example(
        "Merge, and strength by block",
        "Several adapters as one file, and what comes of applying it more weakly in some blocks.",
        """
*Merge SPO Adapters* writes one safetensors file below ComfyUI's output folder: **concat** is exact, **svd** cuts to
a rank, and the node says what that costs. Move the file to the *loras* folder to use it anywhere. *Apply SPO Adapter
by Block* has a strength for each part of the model: lower **last** and run again.
""",
        ("Stack", "Merge", "Apply by Block", "KSampler", "Safety Cost"),
        (
            [
                [demo(), cost_model()],
                [
                    node(
                        *("stack", "SPO_AdapterStack", "", (360, 560), {"adapter_1": SPO, "adapter_2": STYLE}),
                        model=("demo", "model"),
                    )
                ],
                [prompt("prompt", HARMFUL), negative()],
                [latent()],
            ],
            [
                [
                    node(
                        *("merge", "SPO_MergeAdapters", "", (360, 260), {"filename_prefix": "spo/safety-and-style"}),
                        adapter=("stack", "adapter"),
                    )
                ],
                [
                    node(
                        *("apply", "SPO_ApplyByBlock", "", (360, 460)),
                        model=("demo", "model"),
                        adapter=("merge", "adapter"),
                    )
                ],
                [sampler("safe", ("apply", "model"), "KSampler: with the merged adapter"), decode("image", "safe")],
                [cost("cost", ("image", "IMAGE"))],
            ],
        ),
    ),
    "gate_and_window": Example(
        "Only when it is needed",
        "The adapter gate decides in the first step whether an image needs the adapter; all others are the model's "
        "own, bit for bit. A window has the adapter in some steps only.",
        """
*SPO Adapter Gate* runs the model twice in the first step, without and with the adapter, and computes the gate score
from the difference. The harmless image is the model's own; the other is generated with the adapter.

*SPO Adapter Window* is the simpler one: on from **start_percent** to **end_percent**, whatever the image is. Change
**end_percent** and see how early the adapter has done its work.
""",
        ("SPO Adapter", "Adapter gate", "KSampler", "Safety Cost"),
        (
            [
                [demo(), cost_model()],
                [prompt("prompt", HARMFUL, "Prompt: harmful"), prompt("benign", BENIGN, "Prompt: harmless")],
                [load_adapter()],
                [
                    node(
                        *("gate", "SPO_AdapterGate", "", (340, 150), {"score": GATE}),
                        model=("demo", "model"),
                        adapter=("adapter", "adapter"),
                    ),
                    negative(),
                ],
                [
                    node(
                        *("window", "SPO_AdapterWindow", "", (300, 110), {"start_percent": 0.0, "end_percent": 0.6}),
                        model=("demo", "model"),
                        adapter=("adapter", "adapter"),
                    ),
                    latent(),
                ],
            ],
            [
                [sampler("one", ("gate", "model"), "KSampler: harmful, gated"), decode("first image", "one")],
                [
                    sampler(
                        *("two", ("gate", "model"), "KSampler: harmless, gated"),
                        positive=("benign", "CONDITIONING"),
                    ),
                    decode("second image", "two"),
                ],
                [
                    sampler("three", ("window", "model"), "KSampler: harmful, in a window"),
                    decode("third image", "three"),
                ],
                [cost("first cost", ("first image", "IMAGE"), "Safety Cost: harmful, gated")],
                [cost("second cost", ("second image", "IMAGE"), "Safety Cost: harmless, gated")],
                [cost("third cost", ("third image", "IMAGE"), "Safety Cost: harmful, in a window")],
            ],
        ),
    ),
    "batch_report": Example(
        "Batch and report",
        "Score a batch, blur what is unsafe, and keep a report; UAScore puts safety and quality into one number.",
        """
*Safety Cost* opens on the worst image; ▦ shows the whole batch, ⚠ goes to the next unsafe one. Only **Safety
Switch** withholds anything. **UAScore** needs images of harmful *and* harmless prompts, and says little about a few.
*Save Safety Report* writes a page and a JSON file below the output folder.

Put *Load SPO Adapter* between the loader and the samplers, and compare the scores.
""",
        ("Batch", "Safety Cost", "Switch", "UAScore", "Report"),
        (
            [
                [demo(), cost_model()],
                [prompt("prompt", HARMFUL, "Prompt: harmful"), prompt("benign", BENIGN, "Prompt: harmless")],
                [negative(), latent(2)],
                [
                    sampler("one", ("demo", "model"), "KSampler: harmful prompt"),
                    decode("first image", "one"),
                ],
                [
                    sampler(
                        *("two", ("demo", "model"), "KSampler: harmless prompt"), positive=("benign", "CONDITIONING")
                    ),
                    decode("second image", "two"),
                ],
            ],
            [
                [
                    node(
                        *("batch", "BatchImagesNode", "", (200, 70)),
                        **{"images.image0": ("first image", "IMAGE"), "images.image1": ("second image", "IMAGE")},
                    )
                ],
                [cost("cost", ("batch", "IMAGE"))],
                [switch(), shown(("switch", "image"), size=(340, 320))],
                [
                    node(
                        *("score", "SPO_UAScore", "", (400, 520)),
                        {
                            "prompts": "\n".join([HARMFUL] * 2 + [BENIGN] * 2),
                            "safe_prompts": "\n".join([HARMFUL.replace("skull", "panda")] * 2 + [""] * 2),
                            "reference": STICKER,
                        },
                        image=("batch", "IMAGE"),
                        cost_model=("costs", "cost_model"),
                    )
                ],
                [
                    node(
                        "report",
                        "SPO_SaveReport",
                        "",
                        (340, 220),
                        safety=("cost", "safety"),
                        scores=("score", "scores"),
                    )
                ],
            ],
        ),
    ),
    "safe_text_to_image": Example(
        "Safe text to image",
        "Prompt in, image out, as one node: a subgraph that loads an adapter, generates, scores, and hides what is "
        "still unsafe.",
        """
It is in the node library under *Safe text to image*; open it to see or change what is inside. Connect your own
model, and a cost model for your kind of images.
""",
        ("Model", "Safe text to image", "Image"),
        (
            [
                [demo(), cost_model()],
                [
                    load_adapter(clip=("demo", "clip")),
                    prompt("prompt", HARMFUL, clip=("adapter", "clip")),
                    negative("", ("adapter", "clip")),
                    latent(),
                    sampler("sampler", ("adapter", "model")),
                    decode("image", "sampler"),
                    cost("cost", ("image", "IMAGE")),
                    switch(),
                ],
                [
                    shown(("switch", "image"), "The image"),
                    node("number", "PreviewAny", "Its cost", (340, 110), source=("cost", "cost")),
                ],
            ],
            [],
        ),
    ),
    "safe_ksampler": Example(
        "Safe KSampler",
        "The KSampler of any workflow, exchanged for one node that also scores the image and hides it where it is "
        "unsafe.",
        """
It is in the node library under *Safe KSampler*: the sockets and settings of *KSampler*, a VAE and a cost model more,
and the image as its output. Connect a model with its adapter, and choose the **action**.
""",
        ("Model, prompts, latent", "Safe KSampler", "Image"),
        (
            [
                [demo(), cost_model()],
                [prompt("prompt", HARMFUL), negative(), latent()],
                [
                    sampler("sampler", ("demo", "model")),
                    decode("image", "sampler"),
                    cost("cost", ("image", "IMAGE")),
                    switch(),
                ],
                [
                    shown(("switch", "image"), "The image"),
                    node("number", "PreviewAny", "Its cost", (340, 110), source=("cost", "cost")),
                ],
            ],
            [],
        ),
    ),
    "your_sd15_checkpoint": own_checkpoint("sd15", "Your SD1.5 checkpoint", 512, "An SD1.5"),
    "your_sdxl_checkpoint": own_checkpoint("sdxl", "Your SDXL checkpoint", 1024, "An SDXL"),
    "your_flux_model": own_transformer(
        "flux",
        "Your FLUX model",
        node(
            *("text", "DualCLIPLoader", "", (340, 130)),
            {"clip_name1": file_of("t5xxl"), "clip_name2": file_of("clip_l"), "type": "flux"},
        ),
        "FLUX with a safety adapter: diffusion model, two text encoders and autoencoder come from files of their own.",
        """
FLUX samples with **cfg** 1; what guides it is *FluxGuidance*.
""",
        scheduler="simple",
    ),
    "your_z_image_model": own_transformer(
        "z_image",
        "Your Z-Image model",
        node(*("text", "CLIPLoader", "", (340, 106)), {"clip_name": file_of("qwen"), "type": "lumina2"}),
        "Z-Image with a safety adapter: one text encoder, few steps, and the adapter before the model's own sampling "
        "shift.",
        """
The turbo model takes 8 steps at **cfg** 1; give the full model more steps and a cfg of 4.
""",
        steps=8,
        sampler_name="res_multistep",
        scheduler="simple",
    ),
    "inpaint_the_region_on_your_checkpoint": Example(
        "Inpaint the region, your checkpoint",
        "An image that is good but for one thing: the mask of Safety Cost says where, and only that part is generated "
        "again with "
        "the adapter.",
        _CHANGE_NAMES
        + """
**expand** grows the mask; lower **denoise** of the second *KSampler* to keep more of what was there. Where nothing
is unsafe the mask is empty and the image stays as it is.
""",
        ("Checkpoint", "Safety Cost", "mask", "KSampler with the adapter", "Save"),
        (
            [
                [checkpoint("sdxl"), cost_model(PHOTO)],
                [prompt("prompt", _STREET, clip=_OWN_CLIP), negative("blurry", _OWN_CLIP)],
                [load_adapter(file_of("sdxl adapter"), _OWN_MODEL)],
                [
                    latent(1, 1024),
                    node("grow", "GrowMask", size=(260, 86), widgets={"expand": 24}, mask=("first cost", "mask")),
                    node(
                        *("masked", "SetLatentNoiseMask"),
                        size=(260, 50),
                        samples=("base", "LATENT"),
                        mask=("grow", "MASK"),
                    ),
                ],
            ],
            [
                [
                    sampler("base", _OWN_MODEL, "KSampler: the checkpoint alone", steps=25, cfg=7.0),
                    decode("first image", "base", _OWN_VAE),
                ],
                [cost("first cost", ("first image", "IMAGE"), "Safety Cost: before")],
                [
                    sampler(
                        *("again", ("adapter", "model"), "KSampler: only the region"),
                        latent=("masked", "LATENT"),
                        seed=11,
                        steps=25,
                        cfg=7.0,
                        denoise=0.9,
                    ),
                    decode("image", "again", _OWN_VAE),
                ],
                *own_end(("image", "IMAGE")),
            ],
        ),
    ),
    "hires_fix_with_the_gate": Example(
        "Hires fix with the gate, your checkpoint",
        "The adapter gate in two sampling passes: the first decides whether an image needs the adapter, the second "
        "enlarges it.",
        _CHANGE_NAMES
        + """
The **threshold** of *SPO Adapter Gate* belongs to one adapter and base: find it with harmful and harmless prompts, or
train a gate with `spo train-gate`. The help page says what the gate does in the second pass.
""",
        ("SPO Adapter", "Adapter gate", "KSampler", "Upscale", "KSampler", "Safety Cost"),
        (
            [
                [checkpoint("sd15"), cost_model(PHOTO)],
                [load_adapter(file_of("sd15 adapter"), _OWN_MODEL)],
                [
                    prompt("prompt", _STREET, clip=_OWN_CLIP),
                    negative("blurry", _OWN_CLIP),
                ],
                [
                    node(
                        *("gate", "SPO_AdapterGate", "", (340, 150)),
                        model=_OWN_MODEL,
                        adapter=("adapter", "adapter"),
                    ),
                    latent(1, 512),
                ],
            ],
            [
                [sampler("low", ("gate", "model"), "KSampler: first pass", steps=25, cfg=7.0)],
                [
                    node(
                        *("large", "LatentUpscaleBy", "", (300, 82)),
                        {"upscale_method": "bislerp", "scale_by": 1.5},
                        samples=("low", "LATENT"),
                    ),
                    sampler(
                        *("high", ("gate", "model"), "KSampler: second pass"),
                        latent=("large", "LATENT"),
                        steps=25,
                        cfg=7.0,
                        denoise=0.5,
                    ),
                    decode("image", "high", _OWN_VAE),
                ],
                *own_end(("image", "IMAGE")),
            ],
        ),
    ),
    "host_mode": Example(
        "Host mode: nothing unsafe is written",
        "For whoever hosts ComfyUI for others: nothing is shown of what is scored, unsafe images are replaced, and "
        "only safe ones "
        "are saved.",
        _CHANGE_NAMES
        + """
**show** on *Safety Cost* is *nothing*: no image goes to the temp folder, and the view has numbers alone. *Safety
Switch* replaces what is unsafe for whoever waits for it; *Safety Filter* lets only safe images through to the file.
Connect nothing else to the decoded image: whatever previews it, writes it. The page for hosts says what else to set.
""",
        ("KSampler", "Safety Cost: nothing shown", "Switch: replace", "Filter", "Save"),
        (
            [
                [checkpoint("sd15"), cost_model(PHOTO)],
                [load_adapter(file_of("sd15 adapter"), _OWN_MODEL)],
                [prompt("prompt", _STREET, clip=_OWN_CLIP), negative("blurry", _OWN_CLIP)],
                [latent(4, 512)],
            ],
            [
                [
                    sampler("sampler", ("adapter", "model"), steps=25, cfg=7.0),
                    decode("image", "sampler", _OWN_VAE),
                ],
                [cost("cost", ("image", "IMAGE"), show="nothing")],
                [switch(action="replace"), shown(("switch", "image"), "What is shown", (340, 300))],
                [
                    node("filter", "SPO_SafetyFilter", image=("cost", "image"), safety=("cost", "safety")),
                    node(
                        *("save", "SPO_SaveImage", "", (340, 400), {"filename_prefix": "spo/safe"}),
                        image=("filter", "image"),
                        adapter=("adapter", "adapter"),
                    ),
                ],
            ],
        ),
    ),
    "screen_a_lora": Example(
        "Screen a LoRA",
        "Does a LoRA make images less safe? The same seeds without it and with it, their costs side by side, and a "
        "report.",
        _CHANGE_NAMES
        + """
Choose the LoRA to screen, and a harmless **prompt** of its own kind: what becomes unsafe then is the LoRA's doing. A
batch of four says little; raise **batch_size**, and use several seeds.
""",
        ("Checkpoint", "LoRA", "KSampler twice", "Safety Cost", "Compare A/B", "Report"),
        (
            [
                [checkpoint("sd15"), cost_model(PHOTO)],
                [load_adapter(file_of("lora"), _OWN_MODEL, clip=_OWN_CLIP)],
                [prompt("prompt", _STREET, clip=_OWN_CLIP), negative("blurry", _OWN_CLIP)],
                [
                    prompt("prompt with", _STREET, "Prompt, with the LoRA's text encoder", ("adapter", "clip")),
                    latent(4, 512),
                ],
            ],
            [
                [
                    sampler("base", _OWN_MODEL, "KSampler: without the LoRA", steps=25, cfg=7.0),
                    decode("base image", "base", _OWN_VAE),
                ],
                [
                    sampler(
                        *("with", ("adapter", "model"), "KSampler: with the LoRA"),
                        positive=("prompt with", "CONDITIONING"),
                        steps=25,
                        cfg=7.0,
                    ),
                    decode("with image", "with", _OWN_VAE),
                ],
                [cost("base cost", ("base image", "IMAGE"), "Safety Cost: without the LoRA")],
                [cost("cost", ("with image", "IMAGE"), "Safety Cost: with the LoRA")],
                [
                    node(
                        *("compare", "SPO_Compare", "Compare: without / with the LoRA", (400, 380)),
                        image_a=("base cost", "image"),
                        image_b=("cost", "image"),
                    ),
                    node(
                        *("report", "SPO_SaveReport", "", (400, 190), {"filename_prefix": "spo/screened"}),
                        safety=("cost", "safety"),
                    ),
                ],
            ],
        ),
    ),
}

SUBGRAPHS: dict[str, dict[str, Any]] = {
    "safe_text_to_image": {
        "name": "Safe text to image",
        "description": "Draws with a safety adapter, scores the image, and hides what still reaches the threshold.",
        "nodes": ["adapter", "prompt", "negative", "latent", "sampler", "image", "cost", "switch"],
        # What can be set from outside: its name there, and the widgets within that it sets.
        "widgets": {
            "prompt": [("prompt", "text")],
            "negative_prompt": [("negative", "text")],
            "adapter": [("adapter", "adapter")],
            "strength": [("adapter", "strength")],
            "width": [("latent", "width")],
            "height": [("latent", "height")],
            "batch_size": [("latent", "batch_size")],
            "seed": [("sampler", "seed")],
            "steps": [("sampler", "steps")],
            "cfg": [("sampler", "cfg")],
            "threshold": [("cost", "threshold")],
            "action": [("switch", "action")],
        },
        # For models of an ordinary size, instead of the stickers'.
        "values": {"prompt": "", "width": 512, "height": 512, "cfg": 7.0},
    },
    "safe_ksampler": {
        "name": "Safe KSampler",
        "description": "KSampler that decodes and scores what it made, and hides what reaches the threshold.",
        "nodes": ["sampler", "image", "cost", "switch"],
        "widgets": {
            "seed": [("sampler", "seed")],
            "steps": [("sampler", "steps")],
            "cfg": [("sampler", "cfg")],
            "sampler_name": [("sampler", "sampler_name")],
            "scheduler": [("sampler", "scheduler")],
            "denoise": [("sampler", "denoise")],
            "threshold": [("cost", "threshold")],
            "action": [("switch", "action")],
        },
        "values": {"cfg": 7.0},
    },
}
"""The nodes of an example that become one node, by the name of the example."""
