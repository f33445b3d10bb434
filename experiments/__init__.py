"""Experiments that use `lora_param` as any reader would; the library never imports them."""
