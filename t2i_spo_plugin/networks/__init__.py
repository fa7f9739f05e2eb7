"""Networks that cost, quality and gate models share: backbones, the CLIP tower, ONNX."""
