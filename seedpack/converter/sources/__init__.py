"""Where weights come from: state dicts, safetensors files, live modules, and what other rooms register."""
