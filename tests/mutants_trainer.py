"""Mistakes to plant in the trainer: those that training code is known for; see mutants.py."""

# ruff: noqa: E501  (a mistake a line)

CAPTURE = "fastidmm/capture.py"
PLAN, BATCH, LOSS = "fastidmm/plan.py", "fastidmm/batch.py", "kernels/instance_loss.py"
LOADER, DROP = "fastidmm/loaders/planned.py", "fastidmm/backbones/drop.py"
BLOCKS, ROUNDING = "fastidmm/backbones/blocks.py", "fastidmm/backbones/rounding.py"
BUILD, ASSEMBLE = "fastidmm/backbones/build.py", "fastidmm/assemble.py"
IDMM, SUPERVISED = "fastidmm/methods/idmm.py", "fastidmm/methods/supervised.py"
OPTIM, STEP, TRAIN = "fastidmm/optim.py", "fastidmm/step.py", "fastidmm/train.py"
CHECKPOINT, RECORD = "fastidmm/checkpoint.py", "fastidmm/record.py"
EVALUATE, SCORING, STAGES = "fastidmm/evaluate.py", "fastidmm/scoring.py", "fastidmm/stages.py"

FOLLOW = "loaders::test_batches_follow_the_plan[resident-cpu-3]"
COSINE, ADAMW = "optim::test_cosine_after_a_linear_rise", "optim::test_updates_are_adamws"
SKIPPED = "optim::test_what_is_not_finite_is_skipped"
GRADIENT = "step::test_gradients_are_the_batchs_however_often_memory_runs_out"
SUM = "methods::test_micro_batches_sum_to_the_batch"
IDMM_IS = "methods::test_idmm_is_the_mean_over_large_plus_the_mean_over_small"
SUPERVISED_IS = "methods::test_supervised_is_smoothed_cross_entropy_of_mixed_labels"
REPLAYED = "capture::test_replays_are_the_steps_themselves[supervised]"
AHEAD = "capture::test_views_made_ahead_are_those_of_their_step[supervised]"
SHARES = "fastidmm/shares.py"
PREPARE, JOURNAL = "fastidmm/preparing/prepare.py", "fastidmm/preparing/journal.py"
TABLE, DECODE = "fastidmm/preparing/table.py", "fastidmm/preparing/decode.py"
RANKED = "ranks::test_losses_and_gradients_are_those_of_one_process"
KILLED = "train::test_a_run_killed_at_any_step_resumes_to_the_same_bits[4]"
SIGNAL = "train::test_resuming_mid_epoch_after_a_signal"
PATIENCE = "holdout::test_patience_ends_a_stage_and_the_best_counts"
ARMS = "finetune::test_stages_go_on_within_their_arm"
HIGHER = "finetune::test_the_higher_stage_takes_every_tensor_and_the_head"
HELD = "holdout::test_held_out_rows_are_stratified_and_never_learnt"
UNREAD = "holdout::test_with_images_held_out_the_test_split_is_not_read"
PRECISE = "scores::test_a_run_is_scored_in_the_precision_that_it_learnt_in"

MUTANTS: dict[str, tuple[tuple[str, str], list[tuple[str, str]]]] = {
    # What a dataset is prepared to.
    "other photographs take a store's place": ((PREPARE, "prepare::test_other_photographs_do_not_take_a_name"), [("not source.own and description", "description")]),
    "labels of before": ((PREPARE, "table::test_labels_that_were_exchanged_are_taken"), [("[item.file, item.label, *_stamp", "[item.file, *_stamp")]),
    "a picture behind the last mark trusted": ((JOURNAL, "continue::test_what_follows_the_last_mark_is_read_again"), [("Noted(outcome, row < last)", "Noted(outcome, row <= last + 1)")]),
    "a list split by no seed": ((TABLE, "table::test_without_a_split_one_in_five_is_held_out_by_the_seed"), [("held_out(train, names, seed)", "held_out(train, names, 0)")]),
    "shrunk by another filter": ((DECODE, "decode::test_shrinking_is_by_lanczos_of_the_whole_or_of_twice_the_side"), [("Resampling.LANCZOS", "Resampling.BICUBIC")]),
    # What is drawn, and what a batch is made of.
    "every epoch in the same order": ((PLAN, "plan::test_every_row_comes_once_an_epoch"), [("philox((epoch, torch.arange(num_rows", "philox((0, torch.arange(num_rows")]),
    "last short batch dropped": ((PLAN, "plan::test_every_row_comes_once_an_epoch"), [("math.ceil(num_rows / batch_size)", "max(1, num_rows // batch_size)")]),
    "crops by no seed": ((PLAN, "plan::test_every_draw_of_a_crop_changes_with_its_counters"), [("philox(counter, counters.key(Use.CROP))", "philox(counter, Counters(0, counters.attempt).key(Use.CROP))")]),
    "crops the same every epoch": ((PLAN, "plan::test_every_draw_of_a_crop_changes_with_its_counters"), [("counter = (epoch, rows[:, None], views[:, None], blocks)\n    words = philox(counter, counters.key(Use.CROP))", "counter = (0, rows[:, None], views[:, None], blocks)\n    words = philox(counter, counters.key(Use.CROP))")]),
    "all views of an image alike": ((PLAN, "plan::test_no_two_crops_are_drawn_alike"), [("counter = (epoch, rows[:, None], views[:, None], blocks)\n    words = philox(counter, counters.key(Use.CROP))", "counter = (epoch, rows[:, None], 0, blocks)\n    words = philox(counter, counters.key(Use.CROP))")]),
    "flip by jitter's word": ((PLAN, "plan::test_chances_are_as_asked_and_independent"), [("happens(words[:, 22], group.flip)", "happens(words[:, 23], group.flip)")]),
    "views and images swapped": ((PLAN, FOLLOW), [("rows.repeat(views.numel()), views.repeat_interleave(rows.numel())", "rows.repeat_interleave(views.numel()), views.repeat(rows.numel())")]),
    "weight not recomputed after the box is clipped": ((PLAN, "mixing::test_weights_are_the_share_of_pixels_kept"), [("weight = 1 - _over(area, group.size**2)", "weight = folded(words, group)")]),
    "weight not folded": ((PLAN, "mixing"), [("return torch.maximum(drawn, 1 - drawn)", "return drawn")]),
    "Mixup and CutMix by the wrong turns": ((PLAN, "mixing::test_mixup_and_cutmix_take_turns_by_epoch"), [('"cutmix" if epoch % 2 else "mixup"', '"mixup" if epoch % 2 else "cutmix"')]),
    "evaluation from a corner": ((PLAN, "plan::test_central_crops_lie_where_torchvision_cuts"), [("((resized - size).double() / 2).round()", "(resized - size).double() * 0")]),
    "labels shifted by one": ((LOADER, FOLLOW), [("labels=self.label[rows],\n", "labels=self.label[rows - 1],\n")]),
    "partners' labels are the crops' own": ((LOADER, FOLLOW), [("partner_labels=self.label[partners]", "partner_labels=self.label[rows]")]),
    "partners are the crops themselves": ((LOADER, FOLLOW), [("group_plan.crops.rows[group_plan.partner[:num]]", "rows")]),
    "places begin anew in every group": ((LOADER, FOLLOW), [("first += group_plan.total", "first += 0")]),
    "standard deviation of the published slip": ((BATCH, "recipe::test_paper_and_official_differ_where_the_published_code_differs"), [("IMAGENET_STD = (0.229,", "IMAGENET_STD = (0.228,")]),
    # The loss.
    "CutMix's target without the partner": ((IDMM, IDMM_IS), [("views.partners,", "views.rows,")]),
    "weight and its rest swapped in IDMM": ((IDMM, IDMM_IS), [("            views.weights,\n            bias", "            1 - views.weights,\n            bias")]),
    "mean over all groups": ((IDMM, IDMM_IS), [("torch.stack(losses).sum()", "torch.stack(losses).mean()")]),
    "IDMM's micro-batches divided by their own size": ((IDMM, SUM), [("1 / views.total", "1 / views.rows.numel()")]),
    "mixed labels' target without the partner": ((SUPERVISED, SUPERVISED_IS), [("views.partner_labels,", "views.labels,")]),
    "weight and its rest swapped in fine-tuning": ((SUPERVISED, SUPERVISED_IS), [("            views.weights,\n", "            1 - views.weights,\n")]),
    "fine-tuning without smoothing": ((SUPERVISED, SUPERVISED_IS), [("smoothing=self.smoothing", "smoothing=0.0")]),
    "fine-tuning's micro-batches divided by their own size": ((SUPERVISED, SUM), [("1 / views.total", "1 / views.rows.numel()")]),
    "smoothing over N - 1": ((LOSS, "instance_loss " + IDMM_IS), [("smoothing * logits.mean(dim=1)", "smoothing * logits.sum(dim=1) / max(logits.shape[1] - 1, 1)")]),
    "loss in bf16": ((LOSS, "instance_loss"), [("torch.autocast(z.device.type, enabled=False)", "torch.autocast(z.device.type, torch.bfloat16)")]),
    "drop-path by the place in the micro-batch": ((BATCH, SUM), [("set_place(places)", "set_place(torch.arange(len(places)))")]),
    "drop-path of the whole batch": ((DROP, "backbones::test_drops_keep_their_share_and_scale_the_rest"), [("(words >= self._limits)", "(words >= self._limits)[:, :1].expand(words.shape)")]),
    "drop-path not scaled up": ((DROP, "backbones::test_drops_keep_their_share_and_scale_the_rest"), [(".float() / self._stay", ".float()")]),
    "drop-path of a neighbouring block": ((DROP, "backbones::test_paths_are_drawn_together"), [("scales[path.block]", "scales[path.block - 1]")]),
    "the last block's other tokens for its class token": ((BLOCKS, "blocks"), [("_joined(x[:, :1] if", "_joined(x[:, -1:] if")]),
    "keys for values": ((BLOCKS, "blocks"), [("        k, v = functional", "        v, k = functional")]),
    "the class token alone where others are asked for": ((BLOCKS, "blocks"), [("pooled == (\"token\", None) and only_token", "True")]),
    "weights rounded that a layer has yet to change": ((ROUNDING, "rounding"), [("type(module) in PRODUCTS", "isinstance(module, PRODUCTS)")]),
    "gradients left in half precision": ((ROUNDING, "rounding"), [("_foreach_copy_(wide, there)", "_foreach_copy_(wide, [t * 1.01 for t in there])")]),
    "crops dropped in evaluation": ((DROP, "backbones::test_drops_do_nothing_in_evaluation"), [("if not self.training or self.idle", "if self.idle")]),
    "drop-path the same every step": ((STEP, "step::test_every_step_draws_by_its_own_number"), [("    parts.counters.step = batch.step\n", "")]),
    # The update.
    "warm-up by the step": ((OPTIM, COSINE), [("torch.where(epoch < warmup", "torch.where(step < warmup")]),
    "cosine an epoch too short": ((OPTIM, COSINE), [("rest = max(epochs - warmup, 1e-9)", "rest = max(epochs - 1 - warmup, 1e-9)")]),
    "rate stays at its peak": ((OPTIM, COSINE), [("rising, falling)", "rising, 1.0)")]),
    "schedule a step ahead": ((STEP, "train::test_metric_lines_hold_what_they_promise"), [("parts.schedule(number)", "parts.schedule(number + 1)")]),
    "no decay": ((OPTIM, ADAMW), [("weight_decay=options.weight_decay", "weight_decay=0.0")]),
    "decay twice": ((OPTIM, ADAMW), [("weight_decay=options.weight_decay", "weight_decay=2 * options.weight_decay")]),
    "betas swapped": ((OPTIM, ADAMW), [("betas=options.betas", "betas=options.betas[::-1]")]),
    "eps left as torch has it": ((OPTIM, ADAMW), [("        eps=options.eps,\n", "")]),
    "gradients kept for the next step": ((OPTIM, ADAMW), [("    optimizer.zero_grad(set_to_none=True)\n", "")]),
    "steps made that are not finite": ((OPTIM, SKIPPED), [("scale, skipped.float()", "scale, torch.zeros_like(norm)")]),
    "infinite losses let through": ((OPTIM, SKIPPED), [("~(torch.isfinite(norm) & torch.isfinite(loss))", "~torch.isfinite(norm)")]),
    "gradient of the last micro-batch": ((STEP, GRADIENT), [("                _scaled(parts, losses[-1].total).backward()", "                parts.optimizer.zero_grad()\n                _scaled(parts, losses[-1].total).backward()")]),
    "loss of the last micro-batch": ((STEP, GRADIENT), [("total = torch.stack([loss.total.detach() for loss in losses]).sum()", "total = losses[-1].total.detach()")]),
    "gradients before memory ran out are kept": ((STEP, GRADIENT), [("        parts.optimizer.zero_grad(set_to_none=True)\n", "")]),
    "teachers stay behind": ((STEP, "step::test_what_follows_a_step_sees_the_whole_batch_and_moved_weights"), [("    parts.method.after_step(loss.keep | loss.sums, number, made.skipped)\n", "")]),
    "bf16 asked for and not used": ((STEP, "step::test_layers_compute_in_the_precision_asked_for"), [("enabled=parts.dtype != torch.float32", "enabled=False")]),
    # Among ranks.
    "each rank goes its own way": ((STEP, RANKED), [("here.add_up([*shared_gradients(parts.method), numbers", "here.add_up([numbers")]),
    "keys of this rank alone": (("fastidmm/methods/mocov3.py", RANKED), [("            keys = [world().gather(key, batch.shares) for key in keys]\n", ""), ("torch.arange(first, last,", "torch.arange(last - first,")]),
    "statistics of this rank's crops": (("fastidmm/norms.py", "ranks::test_what_ranks_exchange"), [("world().sum(centred.square().flatten(0, -2).sum(dim=0)) / num", "centred.square().flatten(0, -2).mean(dim=0)")]),
    "partners by their place in the whole batch": ((SHARES, "ranks::test_each_rank_makes_its_crops_of_the_one_batch"), [("+ partner % batch - first", "+ partner % batch - first // 2")]),
    "places by the rank": ((SHARES, "ranks::test_each_rank_makes_its_crops_of_the_one_batch"), [("place=wanted)", "place=torch.arange(len(wanted), device=device))")]),
    "smoothing over a rank's rows": (("fastidmm/sharded.py", "sharded::test_the_loss_of_a_head_in_parts_is_that_of_the_whole"), [("rest = smoothing / sum(shards)", "rest = smoothing / max(1, shards[here.rank])")]),
    "rows of the first rank kept": ((CHECKPOINT, "sharded::test_runs_go_on_wherever_rows_are"), [("table[name] = table[name][slice(*world().own(sizes))]", "table[name] = table[name][: sizes[world().rank]]")]),
    "a signal lost while ranks agree": ((TRAIN, "ranks_runs::test_a_signal_to_one_rank_stops_all_and_another_number_goes_on"), [("if asked := world().any(stop.requested):", "if asked := stop.requested:")]),
    # Going on.
    "a step left out after a resume": ((CAPTURE, KILLED), [("loader.batches(parts.state.step)", "loader.batches(parts.state.step + bool(parts.state.step))")]),
    "a resume begins the epoch anew": ((CAPTURE, SIGNAL), [("loader.batches(parts.state.step)", "loader.batches(parts.state.step // parts.loader.steps_per_epoch * parts.loader.steps_per_epoch)")]),
    "moments not restored": ((TRAIN, KILLED), [("    checkpoint.load_optimizer(parts.optimizer, parts.scaler, optimizer)\n", "")]),
    "moments swapped": ((CHECKPOINT, KILLED), [("[key] = tensor", '[{"exp_avg": "exp_avg_sq", "exp_avg_sq": "exp_avg"}.get(key, key)] = tensor')]),
    "bias correction begins anew": ((CHECKPOINT, KILLED), [("[key] = tensor", '[key] = tensor * 0 if key == "step" else tensor')]),
    "attempt not restored": ((TRAIN, "train::test_a_run_that_went_back_resumes_to_the_same_bits"), [("    parts.counters.attempt = parts.state.attempt\n", "")]),
    "metrics not cut": ((TRAIN, KILLED), [("    parts.record.cut(parts.state.step, kept)\n", "")]),
    "last metric line cut, too": ((RECORD, KILLED), [('line["step"] <= step', 'line["step"] < step')]),
    "checkpoint's sums not looked at": ((CHECKPOINT, "train::test_a_damaged_checkpoint_is_passed_over"), [("if _sha256(path / name) != described", "if not described")]),
    "back to the same pictures": ((TRAIN, "train::test_a_second_goes_back_and_meets_other_pictures"), [("parts.state.attempt = parts.counters.attempt = seen.attempt + 1", "parts.state.attempt = seen.attempt + 1")]),
    "never back": ((TRAIN, "train::test_a_second_goes_back_and_meets_other_pictures"), [("if state.strikes >= 2:", "if state.strikes >= 200:")]),
    "skipped steps forgotten": ((TRAIN, "train::test_a_skip_before_a_signal_is_not_forgotten"), [("            state.skipped = float(skipped_since)\n", "")]),
    "another dataset gone on with": ((ASSEMBLE, "train::test_a_dataset_prepared_anew_is_noticed"), [('if fingerprint != record.environment()["train_fingerprint"]', "if not fingerprint")]),
    # Measuring.
    "an image its own neighbour": ((TRAIN, "evaluate::test_the_knn_of_a_metric_line_leaves_each_image_out"), [("known.num_classes, own=True, ", "known.num_classes, ")]),
    "own neighbours beyond the first part": ((EVALUATE, "evaluate::test_leaving_one_out_crosses_chunks"), [("similar[place, start + place]", "similar[place, place]")]),
    "pretraining measured on test images": (
        (TRAIN, UNREAD), [("from fastidmm.store import Store", "from fastidmm.store import Store, folder_of, open_store"),
        ("store, run = parts.store, parts.recipe.run\n", 'run = parts.recipe.run\n    store = open_store(folder_of(run.dataset), "test")\n')],
    ),
    "judged by images that are learnt": ((ASSEMBLE, UNREAD), [("split_rows(recipe, whole)[1]", "split_rows(recipe, whole)[0]")]),
    "held-out images learnt, too": ((ASSEMBLE, HELD), [("        learnt[held] = False\n", "")]),
    "test images learnt": ((ASSEMBLE, HELD), [('store = open_store(folder_of(recipe.run.dataset), "train")', 'store = open_store(folder_of(recipe.run.dataset), "test")')]),
    "scored in training mode": ((EVALUATE, "evaluate::test_outputs_come_in_the_stores_order"), [("    module.eval()\n", "")]),
    "in evaluation's mode ever after": ((EVALUATE, "evaluate::test_evaluating_restores_the_mode_it_found"), [("        module.train(before)\n", "        pass\n")]),
    "scored on crops of another share": ((EVALUATE, "evaluate::test_outputs_come_in_the_stores_order"), [("round(resolution * 256 / 224)", "resolution")]),
    "probe scaled by what it is asked": ((EVALUATE, "evaluate::test_the_linear_probe_finds_the_minimum"), [("return ((test - mean) / deviation)", "return ((test - test.mean(dim=0)) / test.std(dim=0))")]),
    "top-5 called top-1": ((EVALUATE, "evaluate::test_measures_against_counting_by_hand"), [("**score(found, labels).as_dict()", "**score(found, labels, top=min(5, num_classes)).as_dict()")]),
    "test images among their neighbours": ((SCORING, "holdout::test_frozen_features_are_judged_by_training_labels_alone"), [("knn(known, store.label, asked, store.num_classes)", "knn(asked, test.label, asked, store.num_classes)")]),
    "random weights that are not": ((SCORING, "holdout::test_random_weights_are_the_seeds_own"), [('"random": frozen_scores(recipe, None, store, test)', '"random": frozen_scores(recipe, encoder_weights(record.result), store, test)')]),
    "random weights of another seed": ((SCORING, "holdout::test_random_weights_are_the_seeds_own"), [("resolution=run.resolution, counters=Counters(run.seed)", "resolution=run.resolution, counters=Counters(0)")]),
    "a stage cut short hides one that is done": ((SCORING, "scores::test_a_stage_that_is_not_finished_hides_no_score"), [("in classifiers(run) if stage.finished}", "in classifiers(run)}")]),
    "features scored in another precision": ((SCORING, PRECISE), [("dtype = dtype_of(run.precision, device)", 'dtype = dtype_of("fp32", device)')]),
    "classifiers scored in another precision": ((SCORING, PRECISE), [("dtype=dtype_of(run.precision, device)", 'dtype=dtype_of("fp32", device)')]),
    "ImageNet's arm begins at random": (("fastidmm/paper/protocol.py", "paper_tables::test_arms_without_pretraining_begin_as_they_are_called"), [('        tables["run"]["init"] = TIMM\n', "        pass\n")]),
    "what is cut short in a table": (("fastidmm/paper/reproduce.py", "reproduce::test_a_stage_that_was_killed_has_no_score_though_it_told_some"), [("return record if record and record.finished else None", "return record")]),
    "earlier weights' scores on a card": (("fastidmm/exporting/card.py", "export::test_scores_of_weights_trained_on_since_are_not_on_the_card"), [(' or evaluation.get("step") != step', "")]),
    "last weights scored for the best": ((SCORING, "holdout::test_the_best_weights_are_those_that_are_scored"), [("checkpoint.load(stage.result, checkpoint.MODEL)", "checkpoint.load(checkpoint.found(stage.checkpoints)[-1], checkpoint.MODEL)")]),
    "the worst kept for the best": ((TRAIN, PATIENCE), [("value > state.best or", "value < state.best or")]),
    "the last of equals kept": ((TRAIN, PATIENCE), [("value > state.best or", "value >= state.best or")]),
    "patience in steps": ((TRAIN, PATIENCE), [("(state.step - state.best_step) / parts.loader.steps_per_epoch", "state.step - state.best_step")]),
    "the newest for the best": ((RECORD, PATIENCE), [("return checkpoint.at(self.best, step) if step else newest", "return newest")]),
    # Captured steps.
    "captured epoch for ever": ((PLAN, REPLAYED), [("when = (counter // num_steps(num, batch_size), counter)", "when = (epoch, counter)")]),
    "captured rows for ever": ((PLAN, REPLAYED), [("places + (counter % num_steps(num, batch_size)) * batch_size", "places + place * batch_size")]),
    "counter stands still": ((CAPTURE, REPLAYED), [("        self._counter.fill_(number)\n", "")]),
    "Mixup and CutMix in one graph": ((CAPTURE, REPLAYED), [("self._num_rows(number), *mixes, ", "self._num_rows(number), ")]),
    "the first batch for ever": ((CAPTURE, "capture::test_batches_that_a_loader_brings"), [("torch._foreach_copy_(places, sources)", "pass")]),
    "graphs outlive their run": ((CAPTURE, "capture_memory::test_nothing_of_a_run_outlives_its_steps"), [("        self.parts.release = nothing\n", "")]),
    "other parts captured unwarmed": ((CAPTURE, "capture_memory::test_other_parts_of_a_batch_warm_up_before_they_are_captured"), [("            self._seen.clear()  # kernels of other shapes are yet to be compiled\n", "")]),
    "views short of memory end a run": ((CAPTURE, "capture_memory::test_views_take_the_memory_of_graphs_where_there_is_no_other"), [("return self.parts.with_room(lambda: self._views(number, counter))", "return self._views(number, counter)")]),
    "a graph replayed without its memory": ((CAPTURE, "capture_memory::test_a_graph_is_not_replayed_whose_memory_went_for_its_views"), [("            if kind not in self._graphs:  # their memory went for these views\n                return step(self.parts, fresh)\n", "")]),
    "this step's views for the next": ((CAPTURE, AHEAD), [("following = self._counter + 1", "following = self._counter + 0")]),
    "graphs whatever comes next": ((CAPTURE, AHEAD), [("return *self._own_kind(number), *self._own_kind(number + 1)", "return self._own_kind(number)")]),
    "views made ahead of another step": ((CAPTURE, AHEAD), [("or self._made != number", "or self._made < 0")]),
    "views made again that were made ahead": ((CAPTURE, "capture::test_views_are_made_once_a_step_and_ahead[idmm-3]"), [("self._made = number + 1", "self._made = -1")]),
    "the next views not waited for": ((CAPTURE, "pretended::test_the_gpus_own_tests_hold[ahead]"), [("            torch.cuda.current_stream().wait_stream(self._beside)\n", "            pass\n")]),
    # Signals, clips and decay.
    "stopped before it is kept": ((TRAIN, "stop::test_a_signal_after_the_last_look_is_heard_after_the_next_step"), [("        if asked:\n            break", "        if stop.requested:\n            break")]),
    "clipped only upwards": ((OPTIM, "optim::test_tensors_are_clipped_and_decay_follows_its_schedule"), [("(n + 1e-6)).clamp(max=1)", "(n + 1e-6)).clamp(min=1)")]),
    "decay of skipped steps": ((OPTIM, "optim::test_tensors_are_clipped_and_decay_follows_its_schedule"), [("torch.where(skipped, 1.0, 1 - lr", "torch.where(skipped & False, 1.0, 1 - lr")]),
    "scaled gradients applied": ((OPTIM, "optim::test_scaled_gradients_are_divided_again"), [("optimizer.grad_scale, optimizer.found_inf = scale,", "optimizer.grad_scale, optimizer.found_inf = None,")]),
    "scale not restored": (("fastidmm/checkpoint.py", "train::test_fp16_overflows_skips_and_resumes"), [("            kept.copy_(tensors.pop(name))\n", "            tensors.pop(name)\n")]),
    "fp16's overflows are strikes": ((OPTIM, "train::test_fp16_overflows_skips_and_resumes"), [("failed = skipped & (~torch.isfinite(loss) | (scale <= 1))", "failed = skipped")]),
    "frozen moved": ((STEP, "step::test_what_is_frozen_stays"), [("        param.grad = None\n", "        pass\n")]),
    # Stages.
    "no pretraining begins from it": ((STAGES, ARMS), [("    if pretrained:\n        settings[", "    if parent:\n        settings[")]),
    "arms mixed": ((STAGES, ARMS), [("if s.pretrained == pretrained and s.resolution", "if s.resolution")]),
    "head new in the higher stage": ((STAGES, HIGHER), [('"init_head": True', '"init_head": False')]),
    "positions resized bilinearly": ((BUILD, HIGHER), [('mode="bicubic"', 'mode="bilinear"')]),
    "positions transposed": ((BUILD, HIGHER), [("grid.flatten(2).transpose(1, 2)", "grid.transpose(2, 3).flatten(2).transpose(1, 2)")]),
    "first weights by no seed": ((BUILD, "backbones::test_first_weights_are_a_function_of_the_seed"), [("manual_seed(counters.seed)", "manual_seed(0)")]),
    "first rate at the higher resolution": ((STAGES, "finetune::test_stages_have_the_published_settings"), [('settings.pop("lr", backbone(old.run.backbone).lr_high)', 'settings.pop("lr", old.optim.lr)')]),
    "fine-tuned without what was learnt": ((STAGES, HIGHER), [("        settings[\"init\"] = os.path.join(\"..\", os.path.relpath(parent.result, parent.folder))\n", "        pass\n")]),
}  # fmt: skip
