"""Complete two prompts in one batch: python examples/complete.py [CHECKPOINT]"""

import sys

import tidar

model = tidar.load(*sys.argv[1:2])
prompts = ["def fibonacci(n):\n", "import json\n\n\ndef load(path):\n"]
params = tidar.SamplingParams(max_new_tokens=48, stop=("\n\n\n",))

for prompt, answer in zip(prompts, model.generate(prompts, params), strict=True):
    print(prompt + answer.text)
    print(f"# {len(answer.token_ids)} tokens, {answer.tokens_per_forward:.2f} a forward\n")
