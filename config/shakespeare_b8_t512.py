# Reference run B: 8 x 512 tokens, all of 9,600 steps, losses of 0.006-0.008 at the end.
# python train.py config/shakespeare_b8_t512.py
out_dir = 'out/shakespeare_b8_t512'
dataset = 'shakespeare_all'
tokenizer = 'gpt2'
val_fraction = 0.0
shift_windows = False

batch_size = 8
seq_len = 512

learning_rate = 3e-4
schedule = 'constant'  # not published: ours
warmup_iters = 0       # not published: ours
max_iters = 9600
weight_decay = 0.01    # not published: ours (torch's default for AdamW)
beta1 = 0.9
beta2 = 0.999
dropout = 0.0          # not published: ours
grad_clip = 1.0        # not published: ours ("clipped")

final_eval_tokens = 20_000  # ours: keeps a trial run on a CPU short; 0 = all
