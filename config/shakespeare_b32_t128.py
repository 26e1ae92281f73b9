# Reference run A: 32 x 128 tokens, loss 10.95 -> 0.0994 at step 5,726 of 10,000.
# python train.py config/shakespeare_b32_t128.py
out_dir = 'out/shakespeare_b32_t128'
dataset = 'shakespeare_all'
tokenizer = 'gpt2'
val_fraction = 0.0
shift_windows = False

batch_size = 32
seq_len = 128

learning_rate = 6e-4
min_lr = 6e-5
schedule = 'cosine'
warmup_iters = 10
max_iters = 10_000
lr_decay_iters = 10_000
weight_decay = 0.1   # not published: ours ("AdamW with weight decay")
beta1 = 0.9          # not published: ours
beta2 = 0.95         # not published: ours
dropout = 0.0        # not published: ours
grad_clip = 1.0
loss_threshold = 0.099999  # the reference compared one batch's loss; folio an epoch's mean, which is later

checkpoint_interval = 500
sample_interval = 500      # not published: ours ("samples during training")
final_eval_tokens = 20_000  # ours: keeps a trial run on a CPU short; 0 = all
