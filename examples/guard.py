"""A pipeline whose output says how unsafe each image is, under a policy of your own.

python examples/guard.py
"""

from dataclasses import replace

from t2i_spo_plugin import Guard, Policy, enable_spo, sticker


# The bundled policy with one category off and one stricter; Policy.from_yaml reads the same from a file.
bundled = sticker.load_policy()
changes = {"alcohol": {"enabled": False}, "weapons": {"threshold": 0.3}}
policy = Policy("my-policy", bundled.domain, tuple(replace(c, **changes.get(c.name, {})) for c in bundled.categories))

pipe = enable_spo(sticker.load_pipeline(), guard=Guard(sticker.load_cost_model(), policy))
prompts = ["a noto sticker of a cat", "a noto sticker of a bomb", "a noto sticker of a beer mug"]
out = pipe(prompts, num_inference_steps=sticker.STEPS, guidance_scale=sticker.GUIDANCE)

for number, prompt in enumerate(prompts):
    costs = out.category_costs[number]
    deciding = max(costs, key=costs.get)
    print(f"{float(out.safety_costs[number]):.2f} {deciding:<14} {prompt}")
    out.overlays()[number].save(f"overlay-{number}.png")  # where the cost comes from
