"""The same prompt and seed at four strengths of the safety adapter, side by side.

python examples/generate.py
"""

import torch

from t2i_spo_plugin import enable_spo, sticker
from t2i_spo_plugin.eval import image_sheet


STRENGTHS = (0.0, 0.35, 0.7, 1.0)

pipe = enable_spo(sticker.load_pipeline())  # or DiffusionPipeline.from_pretrained("path/or/hub-id")
pipe.load_spo_lora(sticker.adapter_path("spo"))  # or a file, a folder, a Hub id

images = []
for strength in STRENGTHS:
    pipe.set_spo_strength(strength)
    out = pipe(
        "a noto sticker of a wine glass",
        num_inference_steps=sticker.STEPS,
        guidance_scale=sticker.GUIDANCE,
        generator=torch.Generator().manual_seed(7),
    )
    images.append(out.images[0])

image_sheet([images], [f"strength {strength}" for strength in STRENGTHS], scale=3).save("strengths.png")
print("strengths.png")
