"""What systems, agents and pairs must show, and the tests and benchmarks that show it: the index, and that it is true.

A row is "file::test" (under tests/) or a script. What only long runs show is in the table of compare_parallel.py.
"""

import ast
import functools
import pathlib

import pytest

from jaxdqn import agents

ROOT = pathlib.Path(__file__).parent.parent

SYSTEMS = {
    "DQN with evaluation and target network, replay, epsilon-greedy": [
        "test_learning_curves::test_cartpole_is_solved_by_four_seeds",
        "test_td::test_terminal_target_is_exactly_the_reward",
    ],
    "DQN with a CNN on pixel-like input": ["test_learning_curves::test_breakout_within_300k_steps"],
    "experience replay": [
        "test_replay::test_ring_holds_what_a_deque_holds",
        "test_replay::test_sampling_is_uniform",
        "test_replay::test_every_complete_start_is_sampled_and_no_other",
    ],
    "one copy of an observation, and of a frame": [
        "test_one_copy::test_items_are_those_of_two_copies_or_stop_before_a_time_limit",
        "test_one_copy::test_stacks_are_those_that_the_environment_gave",
        "test_one_copy::test_bytes_of_a_transition",
        "experiments/benchmarks/convolution.py",
    ],
    "checkpoints without the replay, and the disk they need": [
        "test_refill::test_all_that_can_be_drawn_was_acted_and_nothing_was_learned",
        "test_refill::test_where_all_actions_are_random_a_run_goes_on_bit_for_bit",
        "test_memory::test_the_plan_counts_the_bytes_of_checkpoints",
    ],
    "prioritised replay": [
        "test_sum_tree::test_writes_and_updates_are_those_of_an_array",
        "test_sum_tree::test_sums_do_not_drift_over_a_million_operations",
        "test_sum_tree::test_every_leaf_of_a_million_is_reachable",
        "test_prioritised::test_it_is_the_loop",
        "test_prioritised::test_over_shards_weights_are_relative_to_the_largest_of_all",
        "test_prioritised::test_blind_cliffwalk_takes_a_sixth_of_the_updates",
        "test_memory::test_no_conditional_and_no_copy_of_the_ring_in_the_compiled_step",
        "experiments/benchmarks/prioritised.py",
    ],
    "distributional agents: C51, HL-Gauss, QR-DQN, IQN": [
        "test_distributional::test_c51_is_rlaxs_categorical_q_learning",
        "test_distributional::test_hl_gauss_is_a_loop_over_scipys_normal_distribution",
        "test_distributional::test_qr_dqn_is_rlaxs_quantile_q_learning",
        "test_distributional::test_iqn_is_rlaxs_quantile_q_learning_at_three_draws_of_tau",
        "test_distributional::test_every_scheme_carries_them",
        "experiments/benchmarks/agents.py",
    ],
    "Munchausen DQN": [
        "test_distributional::test_munchausen_in_both_algebraic_forms",
        "test_distributional::test_every_scheme_carries_them",
    ],
    "parallel DQN: N actors with local replays D_i, merged into D_global, one learner, broadcast": [
        "test_stress::test_blocks_arrive_once_in_order_from_eight_actors_with_random_delays",
        "test_actor_learner::test_every_transition_arrives_once_in_its_actors_order",
        "test_actor_learner::test_after_a_broadcast_the_actors_have_the_learners_parameters",
        "test_learning_curves::test_asynchronous_presets_learn_cartpole",
        "experiments/compare_parallel.py",
    ],
    "recurrent Q-learning: burn-in, stored states, rescaled values": [
        "test_recurrent::test_errors_are_rlaxs",
        "test_recurrent::test_the_loss_is_that_of_a_loop",
        "test_recurrent::test_the_stored_state_is_that_from_the_episodes_start",
        "test_recurrent::test_r2d2_learns_what_its_sequences_do_not_hold",
        "test_learning_curves::test_each_agent_of_the_family_learns_cartpole",
    ],
    "data parallelism": [
        "test_modes_agree::test_data_parallel_training_on_given_batches_is_that_of_one_device",
        "test_modes_agree::test_shards_stay_equal_and_a_group_is_as_it_is_alone_bitwise",
        "test_several_hosts::test_two_processes_train_as_two_devices_of_one",
    ],
    "model parallelism": [
        "test_model_sharding::test_a_sharded_network_learns_what_the_whole_one_does",
        "test_model_sharding::test_each_device_holds_its_part_of_parameters_target_and_moments",
    ],
    "asynchronous updates with a parameter server: pull, push, locks": [
        "test_parameter_server::test_locked_pushes_sum_exactly",
        "test_parameter_server::test_unlocked_pushes_get_lost_and_are_counted",
        "test_parameter_server::test_stale_pushes_are_dropped_and_counted",
        "test_parameter_server::test_telemetry_adds_up",
    ],
    "A3C (policy and value, advantage)": [
        "test_actor_critic::test_loss_and_gradient_are_rlaxs",
        "test_parameter_server::test_one_worker_is_the_fused_loop",
        "test_learning_curves::test_asynchronous_presets_learn_cartpole",
        "experiments/compare_parallel.py",
    ],
    "parameter sharing and periodic synchronisation": [
        "test_averaging::test_replicas_are_equal_right_after_a_combination_and_only_then",
        "test_averaging::test_drift_is_that_just_before_the_last_combination",
        "test_averaging::test_bytes_per_update_are_those_of_a_ring_all_reduce",
        "test_axes::test_every_scheme_reports_the_bytes_it_moves",
    ],
    "aggregation of outputs": [
        "test_ensemble::test_mean",
        "test_ensemble::test_vote",
        "test_ensemble::test_ownership",
        "test_ensemble::test_equal_members_act_as_one",
        "test_ensemble::test_members_of_an_ensemble_of_any_agent_learn_as_if_alone",
    ],
    "a worker dies, a worker is slow": [
        "test_faults::test_three_of_four_workers_solve_cartpole",
        "test_faults::test_a_run_survives_the_death_of_a_worker_and_shows_it",
        "test_faults::test_a_slow_worker_is_seen_in_the_rates_and_delays_nobody",
        "test_ray::test_a_dead_ray_worker_is_reported_once_and_the_others_do_its_work",
        "experiments/benchmarks/slow_worker.py",
    ],
    "tabular Q-learning, state-partitioned parallel Q-learning, merge by indicator sum": [
        "test_tabular::test_every_parallel_form_converges",
        "test_tabular::test_one_owner_is_plain_q_learning_bitwise",
        "test_tabular::test_refresh_every_transition_is_unpartitioned_bitwise",
        "test_tabular::test_merge_is_a_partition_of_unity",
    ],
    "deep state-partitioned Q-learning": [
        "test_partitioned::test_the_configured_agent_with_one_partition_is_the_configured_dqn_bitwise",
        "test_partitioned::test_linear_owners_of_one_hot_states_are_tabular_q_learning",
        "test_partitioned::test_only_parameters_and_gradients_can_leave_a_node",
    ],
    "distributed Q-learning with periodic aggregation, on Ray too": [
        "test_tabular::test_aggregates_are_partitions_of_unity",
        "test_tabular::test_workers_that_cover_the_states_jointly_need_visit_weights",
        "test_ray::test_two_ray_workers_are_two_in_process_workers_bitwise",
    ],
    "REINFORCE / policy gradient with baseline": [
        "test_actor_critic::test_the_policy_gradient_is_the_enumerated_one",
        "test_learning_curves::test_reinforce_solves_cartpole",
    ],
    "PQN: lambda returns, minibatches of the newest block, no target network": [
        "test_pqn::test_errors_are_those_of_rlaxs_q_lambda",
        "test_pqn::test_each_epoch_goes_once_through_the_block",
        "test_pqn::test_every_scheme_that_learns_from_blocks_carries_it",
        "experiments/benchmarks/pqn.py",
    ],
    "noisy layers for any agent": [
        "test_noisy::test_the_noise_has_the_moments_of_its_definition",
        "test_noisy::test_online_target_and_selector_draw_noise_of_their_own",
        "test_noisy::test_a_noisy_network_split_over_devices_learns_what_the_whole_one_does",
    ],
    "save, deploy": [
        "test_scripts::test_export_writes_a_policy_that_chooses_as_the_run_does",
        "test_modes_agree::test_an_interrupted_run_resumes_bit_for_bit",
    ],
    "legal actions": [
        "test_masks::test_an_agent_is_that_of_the_legal_actions",
        "test_masks::test_an_agent_never_takes_an_illegal_action",
        "test_masks::test_a_run_takes_no_illegal_action",
        "test_suites::test_2048_is_played_by_its_rules",
    ],
    "telemetry: dormant units, effective rank, replay": [
        "test_telemetry::test_dormant_units_are_those_of_the_loop",
        "test_telemetry::test_effective_rank_of_known_singular_values",
        "test_telemetry::test_prioritised_age_and_histogram_are_those_of_the_loop",
        "test_telemetry::test_a_run_is_the_same_bits_with_and_without",
    ],
    "hyperparameter search, TensorBoard, W&B": [
        "test_sweeps::test_a_planted_optimum_is_found_and_halving_takes_half_the_steps",
        "test_sweeps::test_a_planted_optimum_is_found_by_tpe_round_by_round",
        "test_sweeps::test_survivors_of_halving_were_never_interrupted",
        "test_recording::test_kills_leave_every_value_once_in_tensorboard_and_wandb",
        "experiments/benchmarks/sweep.py",
    ],
    "notebooks": [
        "test_notebooks::test_a_notebook_runs_from_a_clean_kernel_and_leaves_the_repository_alone",
        "test_compare_agents::test_the_committed_results_are_of_what_the_script_trains",
    ],
}


AGENTS = {
    "dqn": ["test_agents::test_loss_gradient_and_priorities_are_rlaxs"],
    "double_dqn": ["test_agents::test_loss_gradient_and_priorities_are_rlaxs"],
    "munchausen": ["test_distributional::test_munchausen_in_both_algebraic_forms"],
    "c51": ["test_distributional::test_c51_is_rlaxs_categorical_q_learning"],
    "hl_gauss": ["test_distributional::test_hl_gauss_is_a_loop_over_scipys_normal_distribution"],
    "qr_dqn": ["test_distributional::test_qr_dqn_is_rlaxs_quantile_q_learning"],
    "iqn": ["test_distributional::test_iqn_is_rlaxs_quantile_q_learning_at_three_draws_of_tau"],
    "rainbow": ["test_distributional::test_rainbow_is_c51_with_the_other_parts"],
    "ensemble_dqn": [
        "test_ensemble::test_members_start_apart_and_learn_as_if_alone",
        "test_ensemble::test_equal_members_learn_as_one_member",
    ],
    "partitioned_dqn": [
        "test_partitioned::test_the_configured_agent_with_one_partition_is_the_configured_dqn_bitwise",
        "test_partitioned::test_separate_nodes_equal_the_partitioned_agent",
    ],
    "r2d2": [
        "test_recurrent::test_the_loss_is_that_of_a_loop",
        "test_recurrent::test_sequences_are_drawn_by_their_priorities",
    ],
    "drqn": ["test_recurrent::test_the_loss_is_that_of_a_loop"],
    "a2c": ["test_actor_critic::test_loss_and_gradient_are_rlaxs"],
    "pqn": ["test_pqn::test_errors_are_those_of_rlaxs_q_lambda"],
    "random": ["test_agents::test_the_random_agent_is_uniform_even_when_asked_to_be_greedy"],
}
"""That an agent is what its name says."""

PAIRS = {
    "one agent, population": {
        "uniform": "test_modes_agree::test_members_one_after_the_other_equal_their_own_runs_bitwise",
        "prioritised": "test_modes_agree::test_of_each_kind_members_and_chunks_are_own_runs_bitwise",
        "sequences": "test_recurrent::test_an_exported_policy_takes_its_state_and_gives_the_next",
        "prioritised_sequences": "test_modes_agree::test_of_each_kind_members_and_chunks_are_own_runs_bitwise",
        "latest": "test_learning_curves::test_a2c_solves_cartpole",
        "minibatches": "test_modes_agree::test_of_each_kind_members_and_chunks_are_own_runs_bitwise",
    },
    "over devices": {
        "uniform": "test_modes_agree::test_shards_stay_equal_and_a_group_is_as_it_is_alone_bitwise",
        "latest": "test_actor_critic::test_schemes_carry_it",
        "sequences": "test_recurrent::test_schemes_carry_it",
        **dict.fromkeys(
            ["prioritised", "prioritised_sequences", "minibatches"],
            "test_modes_agree::test_of_each_kind_shards_stay_equal_and_groups_know_nothing_of_each_other_bitwise",
        ),
    },
    "actors and learner": {
        "uniform": "test_axes::test_a_scheme_trains_and_leaves_a_run",
        "prioritised": "test_prioritised::test_schemes_carry_it",
        **dict.fromkeys(["sequences", "prioritised_sequences"], "test_recurrent::test_schemes_carry_it"),
    },
    "lockstep": {
        "uniform": "test_actor_learner::test_one_actor_in_lockstep_is_the_fused_loop",
        "sequences": "test_recurrent::test_schemes_carry_it",
        **dict.fromkeys(
            ["prioritised", "prioritised_sequences"],
            "test_modes_agree::test_of_each_kind_one_actor_in_lockstep_is_the_fused_loop_bitwise",
        ),
    },
    "parameter server": {
        "uniform": "test_axes::test_a_scheme_trains_and_leaves_a_run",
        "prioritised": "test_prioritised::test_schemes_carry_it",
        **dict.fromkeys(["sequences", "prioritised_sequences"], "test_recurrent::test_schemes_carry_it"),
        "latest": "test_parameter_server::test_one_worker_is_the_fused_loop",
        "minibatches": "test_pqn::test_every_scheme_that_learns_from_blocks_carries_it",
    },
    "averaging": {
        "uniform": "test_averaging::test_one_replica_equals_plain_training_bitwise",
        "prioritised": "test_prioritised::test_schemes_carry_it",
        **dict.fromkeys(["sequences", "prioritised_sequences"], "test_recurrent::test_schemes_carry_it"),
        "latest": "test_actor_critic::test_schemes_carry_it",
        "minibatches": "test_pqn::test_every_scheme_that_learns_from_blocks_carries_it",
    },
    "sharding": {
        "uniform": "test_model_sharding::test_a_sharded_network_learns_what_the_whole_one_does",
        "prioritised": "test_prioritised::test_schemes_carry_it",
        "latest": "test_model_sharding::test_a_sharded_network_learns_what_the_whole_one_does",
        "minibatches": "test_pqn::test_every_scheme_that_learns_from_blocks_carries_it",
    },
}
"""That a parallel form trains from a replay: of an agent, a scheme sees only the replay and what it gives. Whether each
agent may is in docs/compatibility.md, and test_docs.py asks the checks."""


def rows_of_compatibility():
    """(agent, replay, {form: whether it is allowed}) of each row of docs/compatibility.md."""
    lines = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    (_, _, *forms), _, *rows = cells
    return [(agent, replay, {f: x == "x" for f, x in zip(forms, xs, strict=True)}) for agent, replay, *xs in rows]


@functools.cache
def functions_of(module):
    tree = ast.parse((ROOT / "tests" / f"{module}.py").read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def check_shown(rows):
    assert rows
    for shown_by in rows:
        module, _, name = shown_by.partition("::")
        assert name in functions_of(module) if name else (ROOT / shown_by).exists(), shown_by


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_shows_a_system_exists(system):
    check_shown(SYSTEMS[system])


def test_each_agent_and_each_allowed_pair_has_a_row_and_no_other():
    table = rows_of_compatibility()
    assert AGENTS.keys() == set(agents.AGENTS) == {agent for agent, _, _ in table}
    allowed = {(form, replay) for _, replay, forms in table for form, yes in forms.items() if yes}
    assert {(form, replay) for form, rows in PAIRS.items() for replay in rows} == allowed
    for rows in (*AGENTS.values(), *(list(rows.values()) for rows in PAIRS.values())):
        check_shown(rows)
