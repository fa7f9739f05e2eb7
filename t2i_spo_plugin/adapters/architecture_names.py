"""How other programs spell the architectures that `architecture_from_config` names: one table."""

from __future__ import annotations

import re


_NOT_LETTERS = re.compile(r"[^a-z0-9]")

_SPELLINGS = {
    "stable-diffusion-v1": r"(stablediffusion|sd)v?1[1-5]?",
    "stable-diffusion-v2": r"(stablediffusion|sd)v?2[01]?(512|768v?|base)?v?",
    "stable-diffusion-xl-v1-refiner": r"(stablediffusionxl|sdxl)(v?10?)?refiner(v?10?)?",
    "stable-diffusion-xl-v1-base": r"(stablediffusionxl|sdxl)(v?10?)?(base|turbo|lightning)?(v?10?)?",
    "stable-diffusion-3": r"(stablediffusion|sd)v?3(5|m|medium|large|turbo)*",
    "flux-1-dev": r"flux1?(dev|schnell|krea|kontext|fill|canny|depth|redux)*",
    "flux-2": r"flux2(dev|klein|base|4b|9b)*",
    "chroma": r"(flux1?)?chroma(1|hd|base|flash|radiance)*",
    "zimage": r"zimage(turbo|base|edit|omni)*",
    "lumina2": r"lumina(image)?(v?20?)",
    "qwen-image21": r"qwenimage(edit)?21",
    "qwen-image": r"qwenimage(edit|plus|layered|lightning|2[05]\d\d)*",
    "krea2": r"krea2(raw|turbo)?",
    "cosmos": r"anima(preview|unknown|base)?\d?|cosmos(predict)?(1|2|25)?(2b|14b|text2image)*",
    "hi-dream-image": r"hidream(image|i1|e1|e11)?(full|dev|fast)?",
    "ernie-image": r"ernieimage(turbo)?",
    "wan": r"wan(video)?(2[0-9])?(t2v|i2v|ti2v|flf2v|fun|control|a?14b|13b|5b|high|low|noise)*",
    "ltxvideo": r"ltx(v|video)?(v?09\d?|2b|13b|dev|distilled)*",
    "ltx2-video": r"ltx(v|video)?2(3|video|19b)*",
    "hunyuan-video": r"hunyuanvideo(t2v|i2v)?",
    "hunyuan-video-framepack": r"(hunyuanvideo)?framepack(f1)?",
    "hunyuan-image": r"hunyuanimage(21)?(distilled|refiner)?",
    "hunyuan-di-t": r"hunyuandit(g2)?(v1[012])?",
    "kandinsky5": r"kandinsky50?(lite|pro|t2v|i2v|t2i|i2i)*",
    "aura-flow": r"auraflow(v?0[1-3])?",
    "pix-art": r"pixart(alpha|sigma)?",
    "glm-image": r"glmimage",
    "omni-gen": r"omnigen(v?1)?",
    "cog-view4": r"cogview46?b?",
}
"""Regular expressions over the letters and digits of a name, by the name that is used here."""

_SHORT = {
    "stable-diffusion-v1": "SD1",
    "stable-diffusion-v2": "SD2",
    "stable-diffusion-xl-v1-base": "SDXL",
    "stable-diffusion-xl-v1-refiner": "the SDXL refiner",
    "stable-diffusion-3": "SD3",
    "flux-1-dev": "Flux.1",
    "flux-2": "Flux.2",
}
"""What people call them, where the name that is used here is not that."""

_OTHERS = (
    "allegro bria bria-fibo bria-fibo2 cog-video-x cog-view3-plus consis-id dream-lite easy-animate helios "
    "hunyuan-video15 ideogram4 joy-image-edit kandinsky6 kolors latte long-cat-image lumina-next-di-t mochi "
    "motif-video ovis-image prx sana sana-video sky-reels-v2 wan-animate wan-vace"
).split()
"""Architectures of which no other spelling than another case or other hyphens is known."""

_BY_LETTERS = {_NOT_LETTERS.sub("", name): name for name in (*_OTHERS, *_SPELLINGS)}
_PATTERNS = {name: re.compile(pattern) for name, pattern in _SPELLINGS.items()}


def normalise_architecture(name: str) -> str:
    """One spelling for an architecture: `Flux.1-dev/lora` is `flux-1-dev`; lower case where it is not known."""
    name = bare_name(name)
    letters = _NOT_LETTERS.sub("", name)
    # The longest name here has a third of these letters: a header's text is not searched whatever its length.
    if len(letters) > 100:
        return name
    by_pattern = (known for known, pattern in _PATTERNS.items() if pattern.fullmatch(letters))
    return _BY_LETTERS.get(letters) or next(by_pattern, name)


def is_known_architecture(name: str) -> bool:
    """Whether `name`, normalised, is that of an architecture that is known here."""
    return name in _SPELLINGS or name in _OTHERS or name.startswith("unet-")


def short_name(name: str) -> str:
    """What people call the architecture `name`: `SDXL` for `stable-diffusion-xl-v1-base`."""
    return _SHORT.get(name, name)


def bare_name(architecture: str) -> str:
    """The name without the kind of adapter behind it."""
    return architecture.partition("/")[0].strip().lower()
