"""The home of everything that needs transformers, accelerate or peft; each module is imported when it is needed."""
