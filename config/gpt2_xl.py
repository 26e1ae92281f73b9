# GPT-2 XL (1,558M) on 10 billion tokens, 524,288 a step, on eight GPUs of 80 GB.
# Not run yet. For the data and the batch see config/gpt2.py.
# torchrun --nproc_per_node=8 train.py config/gpt2_xl.py --init_from=auto
out_dir = 'out/gpt2_xl'
dataset = 'fineweb'
tokenizer = 'gpt2'
val_fraction = 0.0005

n_layer = 48
n_head = 25
n_embd = 1600
batch_size = 8                    # windows in a GPU's pass: 61 GB by .ci/memory, so no gradient_checkpointing
gradient_accumulation_steps = 64  # passes of all GPUs together: eight for each of eight

learning_rate = 2e-4              # GPT-3's for this size, https://arxiv.org/abs/2005.14165
min_lr = 2e-5
warmup_iters = 700
max_iters = 19_073

eval_interval = 250
checkpoint_interval = 500
sample_interval = 1000
final_eval_tokens = 10_000_000
