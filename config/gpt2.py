# GPT-2 small (124M) on 10 billion tokens, 524,288 a step, on eight GPUs of 80 GB. Not run yet.
# The goal is nanoGPT's validation loss of 2.85 on OpenWebText, reached in 300 billion (--max_iters=600_000).
# Prepare the text first, or train.py takes input.txt for it; fineweb.jsonl has a document a line, in "text".
# python prepare.py --input=fineweb.jsonl --dataset=fineweb --val_fraction=0.0005
# torchrun --nproc_per_node=8 train.py config/gpt2.py --init_from=auto
out_dir = 'out/gpt2'
dataset = 'fineweb'
tokenizer = 'gpt2'
val_fraction = 0.0005

batch_size = 32                   # windows of 1,024 in a GPU's pass: 18 GB by .ci/memory
gradient_accumulation_steps = 16  # passes of all GPUs together: two for each of eight

learning_rate = 6e-4              # nanoGPT's, as are min_lr and what train.py has for AdamW
min_lr = 6e-5
warmup_iters = 700
max_iters = 19_073

eval_interval = 250
checkpoint_interval = 500
sample_interval = 1000
final_eval_tokens = 10_000_000
