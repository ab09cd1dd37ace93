//! Any CDB with any data-out: an answer, no panic, bounded memory.

use proptest::prelude::*;

use super::super::super::actions::TaskAttribute;
use super::super::super::cdb::COMMANDS;
use super::*;

fn settings() -> Vec<LunSettings> {
    vec![
        LunSettings {
            sanitize: true,
            removable: true,
            ..LunSettings::default()
        },
        LunSettings {
            block_bytes: 4096,
            thin: false,
            ..LunSettings::default()
        },
    ]
}

/// A known command with random fields: small numbers are more likely to be valid.
fn cdb() -> impl Strategy<Value = [u8; 16]> {
    let byte = prop_oneof![3 => Just(0u8), 2 => 0..32u8, 1 => any::<u8>()];
    let bytes = prop::collection::vec(byte, 16);
    (any::<prop::sample::Index>(), bytes, any::<bool>()).prop_map(|(which, bytes, known)| {
        let mut cdb = [0; 16];
        cdb.copy_from_slice(&bytes);
        if known {
            let command = &COMMANDS[which.index(COMMANDS.len())];
            cdb[0] = command.opcode;
            if let Some(action) = command.action {
                cdb[1] = cdb[1] & 0xe0 | action;
            }
            // No NACA, which ends all of them alike.
            cdb[command.length() - 1] = 0;
        }
        cdb
    })
}

fn data() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![Just(0u8), 0..40u8, any::<u8>()];
    prop_oneof![
        Just(Vec::new()),
        prop::collection::vec(byte.clone(), 0..100),
        prop::collection::vec(byte, 512),
        Just(vec![0x45; 4096]),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn every_command_is_answered(
        commands in prop::collection::vec((0..4u16, any::<bool>(), cdb(), data()), 1..24)
    ) {
        let mut rig = Rig::of(settings());
        for (lun, first, cdb, data) in commands {
            let nexus = if first { A } else { B };
            let outcome = rig.run(nexus, lun, &cdb, &data);
            prop_assert!(outcome.in_bytes <= 32 * MIB);
            prop_assert!(outcome.sense.len() <= 252);
            let check = outcome.status == Status::CheckCondition;
            prop_assert_eq!(check, !outcome.sense.is_empty());
        }
        prop_assert!(rig.target.tasks.is_empty());
        prop_assert!(rig.target.requests.is_empty());
    }
}

#[test]
fn long_cdbs_are_unknown_commands() {
    let mut rig = Rig::new();
    let mut actions = Actions::default();
    let command = Command {
        nexus: A,
        tag: 5,
        lun: [0, 1, 0, 0, 0, 0, 0, 0],
        attribute: TaskAttribute::Simple,
        cdb: [0x7f; 16],
        long_cdb: Some(Bytes::from(vec![0x7f; 32])),
        data_out: Vec::new(),
        read_bytes: 0,
        write_bytes: 0,
    };
    rig.target.submit(command, &mut actions);
    rig.drive(actions);
    assert_eq!(sense_of(&rig.ended(5).unwrap()), (5, 0x2000));
}

#[test]
fn commands_of_unknown_nexuses_are_dropped() {
    let mut rig = Rig::new();
    let tag = rig.send(NexusId(99), 1, &[0; 6], &[]);
    assert_eq!(rig.aborted, [(NexusId(99), tag)]);
}
