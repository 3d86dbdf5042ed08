"""Files: safe writes, locks, and safetensors."""
