"""Files: safetensors, and a lock."""
