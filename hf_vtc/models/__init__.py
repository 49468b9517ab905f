"""Models, configurations and processors: what may travel beside weights. `hf_vtc.methods` registers them."""
