//! Two minutes of `pss_tests::chaos`; the program `chaos` runs for longer. Needs root.
//!
//! `PSS_TEST_SEED=N` makes other choices.

use std::time::Duration;

use pss_tests::chaos::{Options, run};

#[test]
fn five_servers_and_two_gateways_in_namespaces() {
    let seed = std::env::var("PSS_TEST_SEED").map_or(1, |seed| seed.parse().expect("a number"));
    run(&Options {
        duration: Duration::from_secs(120),
        seed,
        plot: None,
        rot: true,
    });
}
