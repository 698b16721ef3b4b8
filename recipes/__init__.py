"""How the other systems got their data: ShareGPT, Koala, OpenAssistant, Self-Instruct."""
