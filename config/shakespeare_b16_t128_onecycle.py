# Reference run E: 16 x 128 tokens, OneCycleLR; at step 6,100 loss 0.130, average 0.124, best 0.0860.
# python train.py config/shakespeare_b16_t128_onecycle.py
out_dir = 'out/shakespeare_b16_t128_onecycle'
dataset = 'shakespeare_all'
tokenizer = 'gpt2'
val_fraction = 0.0
shift_windows = False

batch_size = 16
seq_len = 128

learning_rate = 3e-4   # not published: ours
schedule = 'onecycle'  # beta1 cycles too, 0.95 -> 0.85 -> 0.95
warmup_iters = 0       # the cycle has a warm-up of its own
max_iters = 6100       # not published: ours (the last published step)
lr_decay_iters = 6100  # not published: ours
weight_decay = 0.01    # not published: ours (torch's default for AdamW)
beta2 = 0.999          # not published: ours (torch's default)
dropout = 0.0          # not published: ours
grad_clip = 0.5

final_eval_tokens = 20_000  # ours: keeps a trial run on a CPU short; 0 = all
