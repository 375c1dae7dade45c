"""Early-stopped sampling for OpenAI-compatible servers: monitor, gate, gateway, vLLM plugin."""
