"""Eight fake CPU devices, key-reuse checks, a persistent compilation cache, and float64 on request."""

import gc
import importlib.metadata
import os
import pathlib
import platform

# Before jax is imported anywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests are mostly compilation of small programs: leaving out LLVM's optimisations takes a third off their time.
COMPILE_QUICKLY = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # a flag that jaxlib does not know ends the process
    COMPILE_QUICKLY += " --xla_cpu_use_fusion_emitters=false"  # another third
if platform.machine() == "x86_64":  # no fused multiply-adds, which XLA uses at one shape and not at another
    COMPILE_QUICKLY += " --xla_cpu_max_isa=AVX"
_DEVICES = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES} {COMPILE_QUICKLY}"

import jax
import pytest

jax.config.update("jax_debug_key_reuse", True)


def check_keys_where_there_are_some():
    """Leave out checks of moves outside `jit` that have no key among their arguments, where there is nothing to find.

    JAX traces each of them anew to see what it does with keys, which took a sixth of the tests' time.
    """
    from jax.experimental.key_reuse import _core as reuse

    check, moves = reuse.call_impl_with_key_reuse_checks, {jax.lax.slice_p, jax.lax.concatenate_p, jax.lax.device_put_p}

    def checked(primitive, implementation, *args, **params):
        if primitive in moves and not any(isinstance(arg, reuse.prng.PRNGKeyArray) for arg in args):
            return implementation(*args, **params)
        return check(primitive, implementation, *args, **params)

    reuse.call_impl_with_key_reuse_checks = checked


if jax.__version__.startswith("0.10."):  # JAX's insides, which others may not have
    check_keys_where_there_are_some()
# JAX keeps what it traced, a heap of gigabytes: searching it for garbage took a fifth of the time.
gc.set_threshold(200_000, 20, 1000)
_CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(_CACHE)))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small programs, met again and again
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture
def x64():
    """Compute in float64 for the length of a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data, or a skip that says where it was looked for."""
    folder = pathlib.Path(os.environ.get("DDJAX_DATA", pathlib.Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder} (set DDJAX_DATA)")
    return folder


# Variants of one test cost seconds each to compile. Of these families the first few are in the fast set, the others run
# with the slow one: a change to a formula should be tried against both sets.
FAST_VARIANTS = {
    "test_a_chain_of_one_site_is_exact": 0,
    "test_a_chain_on_a_grid_converges_at_first_order": 0,
    "test_a_chain_tends_to_the_entropy_at_first_order": 1,
    "test_a_coin_rarer_than_the_grid_of_uniforms": 0,
    "test_a_disk_full_of_metrics": 0,
    "test_a_mislabelled_denoiser_is_dearer": 0,
    "test_a_path_of_normals_gives_its_example_back": 1,
    "test_a_planner_sees_what_was_drawn_and_is_believed": 0,
    "test_a_recording_gives_its_example_back": 1,
    "test_a_run_stops_and_shows_itself_on_the_way": 0,
    "test_a_sample_is_shown_at_every_step_and_evaluations_are_split_as_asked": 0,
    "test_a_signal_saves_and_the_same_command_ends_as_if_nothing_had_been": 0,
    "test_a_step_is_finite_and_moves": 1,
    "test_a_tree_is_dropped_whole": 0,
    "test_a_window_over_eight_devices": 0,
    "test_absorbing_and_uniform_chains_are_the_mixtures_on_the_grid": 1,
    "test_all_conversions_agree_with_the_definitions": 3,
    "test_all_densities_and_weights_are_finite_in_float32": 1,
    "test_an_example_at_its_own_times_is_as_if_alone": 1,
    "test_an_example_of_the_model_becomes_one_of_the_other_condition_in_law": 1,
    "test_ancestral_reaches_the_law": 0,
    "test_any_diffusion_transports_gaussians_at_first_order": 3,
    "test_any_parameters_keep_mean_and_variance": 0,
    "test_any_shape_any_batch_and_conditions": 0,
    "test_any_shape_of_state_and_times_per_site": 0,
    "test_argmax_follows_the_law": 3,
    "test_binned_bound_is_a_probability": 1,
    "test_blackout_learns_and_samples": 0,
    "test_both_ends_are_finite_in_float32": 1,
    "test_both_ends_in_float32": 4,
    "test_both_ends_of_the_shadow_in_float32": 2,
    "test_bound_and_gradient_are_finite_at_every_time": 0,
    "test_bridge_is_bayes_rule": 4,
    "test_bridge_is_conditioning_of_the_joint_gaussian": 3,
    "test_cached_samples_are_the_same_and_cost_a_call_for_each_change": 0,
    "test_campbells_rates_are_their_definition": 1,
    "test_chains": 1,
    "test_changes_to_the_separation_cost_energy": 1,
    "test_closed_forms": 8,
    "test_closed_forms_for_any_parameters": 0,
    "test_conditions_guidance_known_sites_and_grids_of_each_example": 0,
    "test_confidence_shares_sigma_out_over_shown_sites": 0,
    "test_continuous_time": 5,
    "test_continuous_time_gives_the_entropy": 1,
    "test_conversions_are_their_definitions": 1,
    "test_convolution_against_xla": 3,
    "test_ddpm_tables_are_the_products_of_their_betas": 1,
    "test_decreasing_from_noise_to_data": 17,
    "test_default_losses_and_gradients_are_finite": 1,
    "test_degradations": 0,
    "test_drawn_losses_average_to_the_exact_one": 0,
    "test_draws_agree_with_the_entropy_and_have_finite_gradients": 0,
    "test_draws_follow_the_law": 1,
    "test_draws_have_the_expected_loss": 1,
    "test_draws_where_asked_do_not_depend_on_the_others": 0,
    "test_dropout_does_not_depend_on_the_batch_split": 1,
    "test_each_site_keeps_its_law": 2,
    "test_eight_devices_are_one": 1,
    "test_ema_against_a_loop": 2,
    "test_evaluate_is_the_mean_of_the_bound": 0,
    "test_evaluations_double": 1,
    "test_events_come_at_the_times_of_the_schedule": 0,
    "test_every_evaluation_is_counted_and_none_depends_on_neighbours": 0,
    "test_every_name_builds": 22,
    "test_every_objective_of_the_bench_builds": 4,
    "test_every_parameter_gets_a_gradient": 2,
    "test_every_statement_follows_from_every_pair_that_determines_it": 1,
    "test_exact_denoiser_gives_the_entropy": 0,
    "test_exact_predictions_convert_into_each_other": 4,
    "test_expected_loss_is_the_bound_over_the_window": 0,
    "test_expected_loss_is_the_diffusion_term_per_site": 1,
    "test_gaussian_bound_is_minus_log_density": 1,
    "test_gaussian_data_in_closed_form": 0,
    "test_gaussian_formula_at_every_kind": 1,
    "test_gradients_are_finite": 1,
    "test_heun_ends_at_the_state_of_the_data": 3,
    "test_images_bound_and_sample_in_float32": 0,
    "test_in_continuous_time_the_exact_denoiser_pays_the_same_on_every_path": 0,
    "test_in_the_box_also_at_its_walls": 0,
    "test_inverse_and_derivative": 2,
    "test_it_is_the_bound_with_less_variance": 0,
    "test_it_is_the_denoiser_of_the_other_schedule": 3,
    "test_it_is_the_density_of_the_law": 0,
    "test_it_is_the_loop": 1,
    "test_it_is_the_published_algorithm": 0,
    "test_its_cost_falls_with_the_draws_and_one_draw_is_worse_than_none": 0,
    "test_json_round_trip_and_report": 0,
    "test_kernels_compose": 3,
    "test_known_sites_give_the_conditional_entropy": 2,
    "test_levels_are_told_by_the_law_of_what_they_become": 0,
    "test_log_volumes_are_those_of_jacobians": 0,
    "test_long_chains_tend_to_the_path_at_first_order": 1,
    "test_loose_bounds_are_bounds_and_say_so": 1,
    "test_loss_is_the_papers_and_its_excess_the_kl_of_the_classifiers": 1,
    "test_losses_in_float32_have_the_gradients_of_float64": 1,
    "test_marginal_and_bridge_are_products_of_single_site_matrices": 4,
    "test_marginal_bridge_and_reverse_are_matrices": 1,
    "test_marginal_is_the_product_of_small_steps": 4,
    "test_marginal_moments_and_density": 3,
    "test_memory_grows_with_the_symbols_not_with_their_square": 2,
    "test_microbatches_with_rows_give_the_whole": 1,
    "test_moments_bridge_and_bound_are_linear_algebra": 1,
    "test_nelbo_is_the_theory_on_gaussian_data": 1,
    "test_no_nan_from_data_without_noise": 1,
    "test_no_nan_from_noise_to_data": 2,
    "test_noise_alone_is_the_variance_preserving_process": 0,
    "test_numbers_agree": 0,
    "test_objectives_that_are_bounds": 2,
    "test_one_path_for_all_grids": 0,
    "test_one_site_after_the_other_is_autoregression": 1,
    "test_one_site_has_its_entropy_exactly_at_every_number_of_steps": 1,
    "test_one_site_steps_give_the_entropy": 0,
    "test_one_site_steps_of_more_sites_and_of_one": 0,
    "test_order_of_convergence": 1,
    "test_order_of_convergence_of_the_likelihood": 0,
    "test_order_of_convergence_on_a_mixture": 2,
    "test_path_kl_in_float32": 3,
    "test_path_kl_is_the_limit_of_the_step_kl": 3,
    "test_path_kl_vanishes_for_a_clean_prediction": 1,
    "test_per_site_is_mulans_polynomial": 0,
    "test_point_masses_are_reached_in_one_step": 5,
    "test_prior_kl_is_brute_force": 1,
    "test_prior_kl_is_the_closed_form": 3,
    "test_priors_and_known_sites_of_each_example": 0,
    "test_rate_is_the_derivative_of_the_kernel": 4,
    "test_rates_carry_the_law_back": 2,
    "test_remat_and_scan_have_the_same_gradients_and_remat_recomputes": 0,
    "test_result_is_whole": 0,
    "test_reverse_is_exact_whatever_is_predicted": 3,
    "test_reverse_rates_are_the_time_reversal": 3,
    "test_sample_has_the_propagated_law": 1,
    "test_samplers_reach_the_law": 1,
    "test_samples_do_not_depend_on_the_batch": 2,
    "test_samples_have_the_law": 0,
    "test_scalings_keep_the_log_snr": 1,
    "test_schedules_are_consistent": 1,
    "test_sde_has_the_marginals": 3,
    "test_sites_of_weight_zero_are_shown_clean_and_cost_nothing": 1,
    "test_sites_of_weight_zero_cost_nothing_and_weights_count": 0,
    "test_slope_where_nothing_is_left": 0,
    "test_small_steps_keep_small_probabilities": 0,
    "test_split_rows_drop_the_same": 0,
    "test_step_and_path_kl_are_the_kls_of_their_definition": 1,
    "test_step_kl_is_brute_force": 1,
    "test_step_kl_is_that_of_the_two_laws_whatever_is_predicted": 1,
    "test_steps_from_and_to_the_ends_are_finite": 3,
    "test_steps_go_where_they_are_worth_it": 0,
    "test_steps_of_any_length_are_laws": 2,
    "test_survival_keeps_its_precision_at_both_ends": 6,
    "test_text_in_three_blocks": 0,
    "test_the_best_arm_of_each_condition_is_found": 0,
    "test_the_bound_depends_on_the_ends_alone": 1,
    "test_the_bound_is_finite_at_the_edge_of_float32": 3,
    "test_the_bound_is_the_entropy_and_a_wrong_network_pays_its_kls": 1,
    "test_the_bound_is_the_entropy_and_what_q_of_z_differs_from_p": 0,
    "test_the_bound_is_unit_weight_over_log_snr": 0,
    "test_the_bound_of_a_gaussian_is_theory": 0,
    "test_the_bounds_gradient_by_its_parameters": 0,
    "test_the_cavity_is_tempered_whatever_is_predicted": 2,
    "test_the_chosen_normal_is_the_expected_maximum": 0,
    "test_the_continuity_equation_and_the_score": 1,
    "test_the_corrector_leaves_the_law_as_it_is": 1,
    "test_the_density_is_the_power_law": 1,
    "test_the_ends_are_finite_in_float32": 3,
    "test_the_evaluator_draws_a_latent_and_counts_its_divergence": 0,
    "test_the_exact_network_is_the_optimum": 1,
    "test_the_expected_loss_is_the_bound": 1,
    "test_the_family_holds_hand_made_solvers": 1,
    "test_the_gap_is_the_kl_of_the_joint_laws": 2,
    "test_the_gradient_is_unbiased": 2,
    "test_the_identity_is_gaussian": 1,
    "test_the_law_converges_at_first_order": 3,
    "test_the_law_is_the_chains_and_windows_apart_have_another": 0,
    "test_the_law_of_one_site_is_stationary_and_approached": 0,
    "test_the_law_of_the_output_converges_at_first_order": 2,
    "test_the_mean_estimate_is_the_slope_of_the_expected_reward": 0,
    "test_the_mean_over_orders": 1,
    "test_the_noise_and_its_law_are_the_closed_forms": 2,
    "test_the_ode_is_the_field_of_the_augmented_space": 0,
    "test_the_parts_of_a_state": 3,
    "test_the_poisson_decoder_is_tight_to_second_order": 0,
    "test_the_python_loop_is_the_compiled_one": 1,
    "test_the_range_moves_nats_between_terms_alone": 0,
    "test_the_residual_of_a_scaled_gaussian_score": 0,
    "test_the_rest_of_a_state_is_drawn_as_its_data_tell_it": 0,
    "test_the_upper_variance_is_exact_for_a_gaussian_of_the_datas_width": 2,
    "test_the_weight_of_the_published_code_is_no_bound": 0,
    "test_times_integrate": 4,
    "test_times_integrate_over_log_snr": 3,
    "test_tokens_come_back_and_do_not_depend_on_the_batch": 0,
    "test_tokens_too": 1,
    "test_training_the_shape_lowers_the_variance_to_its_least": 0,
    "test_transitions_bridge_and_reverse_are_products": 2,
    "test_tweedie_and_the_three_predictions": 0,
    "test_tweedie_is_exact_site_by_site": 1,
    "test_uniform_and_masked_are_kernels": 1,
    "test_uniform_times_have_the_cut_laplace_law": 1,
    "test_v_interpolates_the_papers_log_variances": 1,
    "test_value_and_gradient_are_those_of_the_expected_bound": 0,
    "test_weak_order_on_normal_data": 0,
    "test_what_is_computed_again": 0,
    "test_what_the_network_all_but_excludes_keeps_its_price": 0,
    "test_what_was_cut_off_at_a_checkpoint_is_made_up_for": 0,
    "test_what_was_learned_about_the_process_is_in_the_process": 0,
    "test_whichever_rows_are_drawn_twice_they_stand_for_all": 0,
    "test_with_a_decoder_it_is_the_probability_of_a_level": 1,
    "test_with_fixed_points_the_way_up_is_the_inverse": 1,
    "test_without_tolerance_it_is_the_sequential_sampler": 2,
    "test_without_uniform_noise_it_is_masked": 0,
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark as slow what lies beyond the fast variants of its family."""
    seen = {}
    for item in items:
        name = getattr(item, "originalname", item.name)
        seen[item.path, name] = count = seen.get((item.path, name), 0) + 1
        if count > FAST_VARIANTS.get(name, count):
            item.add_marker(pytest.mark.slow)
