# Reference run C: warm-up, cosine and clipping, then int8. It published no settings; all of these are ours.
# python train.py config/shakespeare_for_int8.py
out_dir = 'out/shakespeare_for_int8'
dataset = 'shakespeare_all'
tokenizer = 'gpt2'
val_fraction = 0.0
shift_windows = False

batch_size = 16        # not published: ours
seq_len = 256          # not published: ours

learning_rate = 6e-4   # not published: ours
min_lr = 6e-5          # not published: ours
schedule = 'cosine'
warmup_iters = 100     # not published: ours
max_iters = 3000       # not published: ours
lr_decay_iters = 3000  # not published: ours
weight_decay = 0.1     # not published: ours
beta1 = 0.9            # not published: ours
beta2 = 0.95           # not published: ours
dropout = 0.0          # not published: ours
grad_clip = 1.0        # not published: ours ("clipping")

final_eval_tokens = 20_000  # ours: keeps a trial run on a CPU short; 0 = all
