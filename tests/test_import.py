import subprocess
import sys

import t2i_spo_plugin


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_loads_no_heavy_library_and_is_quick():
    code = (
        "import sys, time; start = time.perf_counter(); import t2i_spo_plugin; took = time.perf_counter() - start\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'peft', 'numpy', 'PIL', 'safetensors'} & set(sys.modules)\n"
        "print(took, sorted(heavy))"
    )
    runs = [run(code).split(" ", 1) for _ in range(2)]
    assert min(float(took) for took, _ in runs) < 0.3
    assert all(heavy.strip() == "[]" for _, heavy in runs)


def test_errors_can_be_caught_without_torch():
    assert run("import sys; from t2i_spo_plugin import SPOError; print('torch' in sys.modules)").strip() == "False"


def test_what_a_comfyui_pack_uses_needs_no_diffusion_library():
    code = (
        "import sys\n"
        "import t2i_spo_plugin.adapters.adapter, t2i_spo_plugin.adapters.layouts\n"
        "import t2i_spo_plugin.guards.overlay, t2i_spo_plugin.guards.policy\n"
        "import t2i_spo_plugin.cost.base, t2i_spo_plugin.guards.guard\n"
        "print(sorted({'diffusers', 'transformers', 'peft', 'huggingface_hub', 'yaml'} & set(sys.modules)))"
    )
    assert run(code).strip() == "[]"


def test_every_public_name_is_there():
    assert t2i_spo_plugin.__all__ == sorted(t2i_spo_plugin.__all__)
    for name in t2i_spo_plugin.__all__:
        assert getattr(t2i_spo_plugin, name) is not None, name
    assert set(t2i_spo_plugin.__all__) <= set(dir(t2i_spo_plugin))
    assert not hasattr(t2i_spo_plugin, "no_such_name")
