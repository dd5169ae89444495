"""Reading and writing weights: one safetensors file per component, its configuration inside."""
