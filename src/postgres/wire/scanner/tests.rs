//! The scanner against a model of the protocol, cut at random, and against noise.

use proptest::prelude::*;

use super::super::frames::split_off;
use super::*;

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut message = vec![tag];
    message.extend((body.len() as u32 + 4).to_be_bytes());
    message.extend(body);
    message
}

fn startup() -> Vec<u8> {
    message(0, b"\0\x03\0\0user\0alice\0\0").split_off(1)
}

fn key(pid: i32) -> Vec<u8> {
    message(b'K', &[&pid.to_be_bytes()[..], b"secret, of any length"].concat())
}

fn ready(status: u8) -> Vec<u8> {
    message(b'Z', &[status])
}

fn sync() -> Vec<u8> {
    message(b'S', b"")
}

fn error(severity: &str, code: &str) -> Vec<u8> {
    let text = format!("S{severity}\0V{severity}\0C{code}\0M{}\0\0", "long ".repeat(100));
    message(b'E', text.as_bytes())
}

/// A scanner just after login.
fn logged_in() -> Scanner {
    let mut scanner = Scanner::new();
    scanner.sent(&startup());
    scanner.received(&message(b'R', &[0; 4]));
    scanner.received(&key(7));
    scanner.received(&ready(b'I'));
    assert!(!scanner.is_busy() && !scanner.is_lost() && scanner.status() == Status::Idle);
    scanner
}

/// An exchange that a client and a server may have: bytes that are sent, bytes that are received, and so on in turn.
#[derive(Clone, Debug)]
enum Exchange {
    /// A simple query with rows.
    Query(Vec<Vec<u8>>),
    /// One batch of the extended protocol, of any length.
    Batch(Vec<Vec<u8>>),
    /// A query that fails.
    Error,
    /// A dropped statement.
    Close,
    CopyOut(Vec<Vec<u8>>),
    /// COPY FROM, by the simple or the extended protocol.
    CopyIn(bool, Vec<Vec<u8>>),
    /// A message that the server sends unasked.
    Aside(u8, Vec<u8>),
}

fn exchange() -> impl Strategy<Value = Exchange> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..400);
    let rows = move || prop::collection::vec(bytes(), 0..5);
    prop_oneof![
        rows().prop_map(Exchange::Query),
        rows().prop_map(Exchange::Batch),
        Just(Exchange::Error),
        Just(Exchange::Close),
        rows().prop_map(Exchange::CopyOut),
        (any::<bool>(), rows()).prop_map(|(simple, rows)| Exchange::CopyIn(simple, rows)),
        (prop::sample::select(b"ANS".to_vec()), bytes()).prop_map(|(tag, body)| Exchange::Aside(tag, body)),
    ]
}

enum Turn {
    Sent(Vec<u8>),
    Received(Vec<u8>),
}

impl Exchange {
    fn turns(&self, status: u8) -> Vec<Turn> {
        use Turn::{Received, Sent};
        let all = |tag, rows: &[Vec<u8>]| -> Vec<u8> { rows.iter().flat_map(|row| message(tag, row)).collect() };
        let end = [message(b'C', b"DONE 1\0"), ready(status)].concat();
        let batch = [message(b'B', b"\0\0"), message(b'E', b"\0"), sync()].concat();
        match self {
            Exchange::Query(rows) => vec![Sent(message(b'Q', b"select\0")), Received([all(b'D', rows), end].concat())],
            Exchange::Batch(parts) => vec![
                Sent([message(b'P', b"\0"), all(b'B', parts), batch].concat()),
                Received([message(b'1', b""), all(b'D', parts), end].concat()),
            ],
            Exchange::Error => vec![Sent(batch), Received(error("ERROR", "42P01")), Received(ready(status))],
            Exchange::Close => vec![
                Sent([message(b'C', b"Ss1\0"), sync()].concat()),
                Received([message(b'3', b""), ready(status)].concat()),
            ],
            Exchange::CopyOut(rows) => vec![
                Sent(batch),
                Received([message(b'H', b"\0\0\0"), all(b'd', rows), message(b'c', b""), end].concat()),
            ],
            Exchange::CopyIn(simple, rows) => {
                let (begin, finish) = match simple {
                    true => (message(b'Q', b"copy\0"), vec![]),
                    false => (batch, sync()),
                };
                vec![
                    Sent(begin),
                    Received(message(b'G', b"\0\0\0")),
                    Sent([all(b'd', rows), message(b'c', b""), finish].concat()),
                    Received(end),
                ]
            }
            Exchange::Aside(tag, body) => vec![Received(message(*tag, body))],
        }
    }
}

/// Passes `bytes` on in pieces, whose sizes are taken round and round from `cuts`.
fn in_pieces(mut bytes: &[u8], cuts: &mut impl Iterator<Item = usize>, mut pass: impl FnMut(&[u8])) {
    while !bytes.is_empty() {
        pass(split_off(&mut bytes, cuts.next().unwrap()));
    }
}

proptest! {
    #[test]
    fn follows_any_conversation_however_it_is_cut(
        exchanges in prop::collection::vec((exchange(), prop::sample::select(b"ITE".to_vec())), 0..20),
        cuts in prop::collection::vec(1..40usize, 1..50),
        pid in any::<i32>(),
    ) {
        let mut cuts = cuts.into_iter().cycle();
        let mut scanner = Scanner::new();
        in_pieces(&startup(), &mut cuts, |piece| scanner.sent(piece));
        prop_assert!(scanner.is_busy());
        in_pieces(&[key(pid), ready(b'I')].concat(), &mut cuts, |piece| scanner.received(piece));
        let mut expected = Status::Idle;
        for (exchange, status) in exchanges {
            let aside = matches!(exchange, Exchange::Aside(..));
            if !aside {
                expected = match status {
                    b'I' => Status::Idle,
                    b'T' => Status::InTransaction,
                    _ => Status::Failed,
                };
            }
            let turns = exchange.turns(status);
            let last = turns.len() - 1;
            for (turn, bytes) in turns.into_iter().enumerate() {
                match bytes {
                    Turn::Sent(bytes) => in_pieces(&bytes, &mut cuts, |piece| scanner.sent(piece)),
                    Turn::Received(bytes) => in_pieces(&bytes, &mut cuts, |piece| scanner.received(piece)),
                }
                prop_assert_eq!(scanner.is_busy(), turn < last && !matches!(exchange, Exchange::Close));
            }
            prop_assert_eq!(scanner.outstanding(), 0);
            prop_assert_eq!(scanner.status(), expected);
            prop_assert!(!scanner.in_copy() && !scanner.is_lost());
        }
        prop_assert_eq!(scanner.pid(), Some(pid));
    }

    #[test]
    fn counts_every_answer_of_a_pipeline(
        requests in prop::collection::vec(prop::sample::select(b"QFS".to_vec()), 0..100),
        answers in 0..100usize,
        cut in 1..20usize,
    ) {
        let mut scanner = logged_in();
        for &request in &requests {
            in_pieces(&message(request, b"\0"), &mut [cut].into_iter().cycle(), |piece| scanner.sent(piece));
        }
        in_pieces(&ready(b'I').repeat(answers), &mut [cut].into_iter().cycle(), |piece| scanner.received(piece));
        prop_assert_eq!(scanner.outstanding(), requests.len().saturating_sub(answers));
        prop_assert_eq!(scanner.is_poisoned(), answers > requests.len());
    }

    /// Nothing that arrives may panic, and how it was cut never matters. Bytes are either plain noise or noise in
    /// frames.
    #[test]
    fn noise_is_harmless_and_its_cuts_do_not_matter(
        frames in prop::collection::vec(
            (any::<bool>(), any::<u8>(), prop::sample::select(b"ZKSEGdcfQSXCBPR".to_vec()),
             prop::collection::vec(any::<u8>(), 0..300), any::<bool>()),
            0..30,
        ),
        cuts in prop::collection::vec(1..100usize, 1..20),
    ) {
        let mut cuts = cuts.into_iter().cycle();
        let mut whole = logged_in();
        let mut pieces = logged_in();
        for (sent, noise, tag, body, framed) in frames {
            let bytes = match framed {
                true => message(tag, &body),
                false => [&[noise], &body[..]].concat(),
            };
            if sent {
                whole.sent(&bytes);
                in_pieces(&bytes, &mut cuts, |piece| pieces.sent(piece));
            } else {
                whole.received(&bytes);
                in_pieces(&bytes, &mut cuts, |piece| pieces.received(piece));
            }
        }
        prop_assert_eq!(format!("{whole:?}"), format!("{pieces:?}"));
        prop_assert!(whole.backend.prefix().len() <= ERROR_PREFIX);
    }
}

#[test]
fn nothing_is_known_before_the_login() {
    let scanner = Scanner::new();
    assert_eq!(scanner.status(), Status::Unknown);
    assert_eq!(scanner.pid(), None);
    assert!(scanner.is_busy());
}

#[test]
fn half_a_message_from_the_server_is_busy_and_no_unanswered_request() {
    let notification = message(b'A', b"\0\0\0\x07channel\0hello\0");
    for cut in 1..notification.len() {
        let mut scanner = logged_in();
        scanner.received(&notification[..cut]);
        assert!(
            scanner.is_busy() && scanner.is_mid_message() && !scanner.has_unanswered() && !scanner.is_lost(),
            "{cut}"
        );
        scanner.received(&notification[cut..]);
        assert!(!scanner.is_busy() && !scanner.is_mid_message(), "{cut}");
    }
}

/// A scanner that has sent its startup packet and received this.
fn logging_in(received: &[u8]) -> Scanner {
    let mut scanner = Scanner::new();
    scanner.sent(&startup());
    scanner.received(received);
    scanner
}

/// The header of a message of this length, the length itself included.
fn header(tag: u8, length: i32) -> Vec<u8> {
    [&[tag][..], &length.to_be_bytes()].concat()
}

#[test]
fn before_the_login_ends_a_message_has_a_greatest_length() {
    let most = LONGEST_LOGIN_MESSAGE as i32 + 4;
    for tag in *b"REKSN" {
        assert_eq!(logging_in(&header(tag, most)).fault(), None);
        for length in [most + 1, i32::MAX] {
            let received = header(tag, length);
            for cut in 0..received.len() {
                let mut scanner = logging_in(&received[..cut]);
                assert_eq!(scanner.fault(), None);
                scanner.received(&received[cut..]);
                assert_eq!(scanner.fault(), Some(&Fault::TooLong(tag, length as usize)));
                assert!(scanner.is_lost());
            }
        }
    }
    // A length that cannot be is left to `postgres` to refuse.
    assert_eq!(logging_in(&header(b'R', 3)).fault(), None);
    // After the login a row may have any length.
    let mut scanner = logged_in();
    scanner.sent(&message(b'Q', b"select\0"));
    scanner.received(&header(b'D', i32::MAX));
    assert!(scanner.fault().is_none() && !scanner.is_lost());
}

#[test]
fn before_the_login_ends_all_messages_together_have_a_greatest_length() {
    let notice = message(b'N', &[b'x'; 1000]);
    let mut scanner = logging_in(b"");
    let accepted = (0..).take_while(|_| {
        scanner.received(&notice);
        scanner.fault().is_none()
    });
    assert_eq!(accepted.count(), LONGEST_LOGIN / notice.len());
    assert_eq!(scanner.fault(), Some(&Fault::TooMuch));
    // After the login there is no such limit.
    let mut scanner = logged_in();
    (0..2 * LONGEST_LOGIN / notice.len()).for_each(|_| scanner.received(&notice));
    assert!(scanner.fault().is_none() && !scanner.is_lost());
}

#[test]
fn the_answer_to_a_question_of_the_pools_has_a_greatest_length() {
    let used = || {
        let mut scanner = logged_in();
        scanner.sent(&message(b'Q', b"LISTEN\0"));
        scanner.received(&[message(b'C', b"LISTEN\0"), ready(b'I')].concat());
        scanner
    };
    let answer = [message(b'I', b""), ready(b'I')].concat();
    let close = [message(b'C', b"S\0"), sync()].concat();
    let notice = message(b'A', &[b'x'; 1000]);
    let ways: [(&dyn Fn() -> Scanner, usize); 2] = [(&logged_in, LONGEST_FIRST_ANSWER), (&used, LONGEST_ANSWER)];
    for (before, longest) in ways {
        let asked = || {
            let mut scanner = before();
            scanner.expect_little();
            scanner.sent(&message(b'Q', b"\0"));
            scanner
        };
        let fault = Some(&Fault::LongAnswer(longest));
        // One message.
        for (tag, length, fault) in [
            (b'N', longest as i32 + 4, None),
            (b'N', longest as i32 + 5, fault),
            (b'E', i32::MAX, fault),
            (b'E', i32::from_be_bytes(*b"text"), fault),
        ] {
            let mut scanner = asked();
            scanner.received(&header(tag, length));
            assert_eq!((scanner.fault(), scanner.is_lost()), (fault, fault.is_some()), "{length}");
        }
        // One that began before it was asked.
        for (length, fault) in [(longest, None), (longest + 1, fault)] {
            let mut scanner = before();
            scanner.received(&[&header(b'A', length as i32 + 4 + 9)[..], b"beginning"].concat());
            assert_eq!(scanner.fault(), None, "nobody asks");
            scanner.expect_little();
            assert_eq!((scanner.fault(), scanner.is_lost()), (fault, fault.is_some()), "{length}");
        }
        // All together.
        let mut scanner = asked();
        scanner.received(&notice.repeat(longest / notice.len() - 1));
        assert_eq!(scanner.fault(), None);
        scanner.received(&notice.repeat(2));
        assert_eq!(scanner.fault(), fault);
        // What comes after the answer is for a caller, also if the end of a dropped statement went out behind the question.
        let mut scanner = asked();
        scanner.sent(&close);
        scanner.received(&answer);
        scanner.sent(&message(b'Q', b"SELECT\0"));
        scanner.received(&[message(b'3', b""), ready(b'I')].concat());
        scanner.received(&message(b'D', &[b'x'; 1000]).repeat(2 * longest / 1000));
        assert!(scanner.fault().is_none() && !scanner.is_lost());
        let mut scanner = asked();
        scanner.received(&answer);
        scanner.received(&notice.repeat(2 * longest / notice.len()));
        assert!(scanner.fault().is_none() && scanner.is_idle());
    }
    // The end of a dropped statement that comes before the answer does not count as one.
    let mut scanner = logged_in();
    scanner.sent(&close);
    scanner.expect_little();
    scanner.sent(&message(b'Q', b"\0"));
    scanner.received(&[message(b'3', b""), ready(b'I')].concat());
    scanner.received(&notice.repeat(LONGEST_ANSWER / notice.len() + 1));
    assert_eq!(scanner.fault(), Some(&Fault::LongAnswer(LONGEST_ANSWER)));
}

#[test]
fn an_error_without_a_length_is_read_as_the_text_it_is() {
    for (received, text) in [
        (&b"Ecould not fork\n\0"[..], "could not fork\n"),
        (b"Ecould not fork", "could not fork"),
        ("E\u{41d}\u{435}\u{442}\0".as_bytes(), "\u{41d}\u{435}\u{442}"),
    ] {
        assert_eq!(logging_in(received).fault(), Some(&Fault::PlainText(text.into())));
    }
    let long = [&b"E"[..], &[b'x'; 5000]].concat();
    assert_eq!(logging_in(&long).fault(), Some(&Fault::PlainText("x".repeat(ERROR_PREFIX))));
    // Behind another message the letters are read as a length.
    let received = [message(b'R', &[0; 4]), b"Ecould not fork".to_vec()].concat();
    assert!(matches!(logging_in(&received).fault(), Some(Fault::TooLong(b'E', _))));
}

#[test]
fn no_session_begins_in_a_transaction_or_in_an_unknown_status() {
    let login = |status| [message(b'R', &[0; 4]), key(7), ready(status)].concat();
    assert_eq!(logging_in(&login(b'I')).fault(), None);
    for status in *b"TE?\0" {
        assert_eq!(logging_in(&login(status)).fault(), Some(&Fault::Status(status)));
    }
    let mut scanner = logged_in();
    scanner.sent(&message(b'Q', b"begin\0"));
    scanner.received(&ready(b'T'));
    assert_eq!(scanner.fault(), None);
}

#[test]
fn a_half_sent_request_is_busy() {
    let mut scanner = logged_in();
    let query = message(b'Q', b"select 1\0");
    scanner.sent(&query[..1]);
    assert!(scanner.is_busy());
    assert_eq!(scanner.outstanding(), 0);
    scanner.sent(&query[1..]);
    assert!(scanner.is_busy());
    assert_eq!(scanner.outstanding(), 1);
}

#[test]
fn the_end_of_a_connection_waits_for_no_answer() {
    let mut scanner = logged_in();
    scanner.sent(&message(b'X', b""));
    assert!(!scanner.has_unanswered() && !scanner.is_busy());
    scanner.received(&message(b'1', b""));
    assert!(scanner.is_poisoned(), "nothing was asked");
}

#[test]
fn a_statement_being_closed_is_not_busy_but_a_ping_is() {
    let mut scanner = logged_in();
    scanner.sent(&[message(b'C', b"Ss1\0"), message(b'C', b"Ss2\0"), sync()].concat());
    assert_eq!(scanner.outstanding(), 1);
    assert!(!scanner.is_busy());
    scanner.sent(&sync());
    assert!(scanner.is_busy());
    scanner.received(&ready(b'I').repeat(2));
    // A close in a batch that does something else is not harmless.
    for rest in [
        [message(b'C', b"Ss1\0"), message(b'P', b"\0")].concat(),
        [message(b'P', b"\0"), message(b'C', b"Ss1\0")].concat(),
    ] {
        scanner.sent(&[rest, sync()].concat());
        assert!(scanner.is_busy());
        scanner.received(&ready(b'I'));
        assert!(!scanner.is_busy());
    }
}

#[test]
fn poison_1_the_end_of_a_copy_that_never_began() {
    for tag in *b"dcf" {
        let mut scanner = logged_in();
        scanner.sent(&message(tag, b"\0"));
        assert!(scanner.is_poisoned() && scanner.is_lost(), "{}", tag as char);
    }
}

#[test]
fn poison_2_an_answer_to_no_request() {
    let mut scanner = logged_in();
    scanner.received(&ready(b'I'));
    assert!(scanner.is_poisoned());
}

#[test]
fn poison_3_an_error_in_a_copy() {
    let mut scanner = logged_in();
    scanner.sent(&[message(b'B', b""), message(b'E', b""), sync()].concat());
    scanner.received(&message(b'G', b"\0\0\0"));
    assert!(scanner.is_busy() && scanner.in_copy());
    assert_eq!(scanner.outstanding(), 0);
    scanner.received(&error("ERROR", "22P02"));
    assert!(scanner.is_poisoned());
}

/// The caller has its answer before the `ReadyForQuery`, and perhaps before the `Sync` was sent.
#[test]
fn a_copy_is_over_when_its_rows_are_taken() {
    let taken = || message(b'C', b"COPY 1\0");
    for begin in [message(b'Q', b"copy\0"), [message(b'B', b""), message(b'E', b""), sync()].concat()] {
        let is_simple = begin[0] == b'Q';
        for early in [false, true] {
            let mut scanner = logged_in();
            scanner.sent(&begin);
            scanner.received(&message(b'G', b"\0\0\0"));
            scanner.sent(&[message(b'd', b"1"), message(b'c', b"")].concat());
            assert!(scanner.in_copy());
            if early {
                scanner.received(&taken());
                assert!(!scanner.in_copy() && scanner.is_busy());
            }
            if !is_simple {
                scanner.sent(&sync());
            }
            if !early {
                scanner.received(&taken());
            }
            assert!(!scanner.in_copy() && scanner.is_busy() && !scanner.is_lost());
            scanner.received(&ready(b'I'));
            assert!(scanner.is_idle());
            assert_eq!(scanner.outstanding(), 0);
        }
    }
}

/// A constraint that is checked at the end.
#[test]
fn an_error_behind_a_copy_is_an_ordinary_one() {
    let mut scanner = logged_in();
    scanner.sent(&[message(b'B', b""), message(b'E', b""), sync()].concat());
    scanner.received(&message(b'G', b"\0\0\0"));
    scanner.sent(&[message(b'd', b"1"), message(b'c', b""), sync()].concat());
    scanner.received(&[message(b'C', b"COPY 1\0"), error("ERROR", "23503"), ready(b'I')].concat());
    assert!(scanner.is_idle());
}

#[test]
fn poison_4_bytes_that_are_not_the_protocol() {
    for length in [i32::MIN, -1, 0, 3] {
        let bytes = [&b"Z"[..], &length.to_be_bytes()].concat();
        let mut scanner = logged_in();
        scanner.received(&bytes);
        assert!(scanner.is_poisoned(), "{length}");
        let mut scanner = logged_in();
        scanner.sent(&bytes);
        assert!(scanner.is_poisoned(), "{length}");
    }
}

#[test]
fn an_ordinary_error_is_neither_poison_nor_fatal() {
    let mut scanner = logged_in();
    scanner.sent(&message(b'Q', b"\0"));
    scanner.received(&error("ERROR", "42P01"));
    // The client has its error now. The `ReadyForQuery` is still to come, and until then the status does not count.
    assert!(scanner.is_busy() && !scanner.is_lost());
    scanner.received(&ready(b'E'));
    assert_eq!(scanner.status(), Status::Failed);
    assert!(!scanner.is_busy() && !scanner.is_lost());
}

#[test]
fn a_fatal_error_leaves_its_code() {
    for (text, words) in [
        (&b"SFATAL\0VFATAL\0C57P01\0Mterminating connection\0\0"[..], "terminating connection"),
        (b"SFATAL\0C57P01\0Mno V: PgBouncer, old servers\0\0", "no V: PgBouncer, old servers"),
        (b"S\xc3\x9cble Sache\0VPANIC\0C57P01\0M\xff in Latin-1\0\0", "\u{fffd} in Latin-1"),
    ] {
        let mut scanner = logged_in();
        scanner.received(&message(b'E', text));
        assert_eq!((scanner.fatal(), scanner.fatal_text()), (Some(*b"57P01"), Some(words)));
        assert!(scanner.is_lost() && !scanner.is_poisoned());
    }
    // A text that is longer than the part that is kept ends in a mark.
    let mut scanner = logged_in();
    scanner.received(&message(b'E', &[b"SFATAL\0C57P01\0M", &[b'x'; 5000][..], b"\0\0"].concat()));
    let words = scanner.fatal_text().unwrap();
    assert!(words.len() <= ERROR_PREFIX && words.ends_with("xxx ... (cut)"), "{words}");
    // Only the severity counts, not a text that looks like one, nor a translation.
    let mut scanner = logged_in();
    scanner.received(&message(b'E', b"SFATAL\0VERROR\0C42601\0MVFATAL\0\0"));
    assert_eq!(scanner.fatal(), None);
}

#[test]
fn a_refused_write_is_reported_once() {
    let mut scanner = logged_in();
    scanner.sent(&message(b'Q', b"insert\0"));
    assert!(!scanner.take_refused_write());
    scanner.received(&error("ERROR", "25006"));
    assert!(scanner.take_refused_write());
    assert!(!scanner.take_refused_write());
    assert!(!scanner.is_lost());
}

/// A write may end inside a batch, and the server answers the part that it has by then.
#[test]
fn an_answer_before_the_end_of_a_batch_counts_for_that_batch() {
    let (bind, sync) = ([message(b'B', b"..."), message(b'E', b"...")].concat(), sync());
    let mut scanner = logged_in();
    scanner.sent(&bind);
    scanner.received(&message(b'2', b""));
    scanner.sent(&sync);
    scanner.received(&error("ERROR", "26000"));
    assert!(!scanner.take_refused_statement() && !scanner.has_missed_a_statement(), "it was bound, and ran");
    scanner.received(&ready(b'I'));
    scanner.sent(&bind);
    scanner.received(&error("ERROR", "23505"));
    assert!(scanner.has_oldest_failed());
    scanner.sent(&sync);
    assert!(scanner.has_oldest_failed());
    scanner.received(&ready(b'I'));
    assert!(!scanner.has_oldest_failed());
    // Of the next batch nothing has been answered.
    scanner.sent(&[bind, sync].concat());
    assert!(!scanner.has_oldest_failed());
    scanner.received(&error("ERROR", "26000"));
    assert!(scanner.take_refused_statement());
}

#[test]
fn a_refused_statement_differs_from_one_that_failed() {
    let bind_and_run = [message(b'B', b"..."), message(b'E', b"..."), sync()].concat();
    let bound = message(b'2', b"");
    for (code, refused) in [("26000", true), ("0A000", true), ("23505", false)] {
        let mut scanner = logged_in();
        scanner.sent(&bind_and_run);
        scanner.received(&bound);
        scanner.received(&error("ERROR", code));
        scanner.received(&ready(b'I'));
        assert!(!scanner.take_refused_statement(), "{code}: it ran");
        scanner.sent(&bind_and_run);
        scanner.received(&error("ERROR", code));
        assert_eq!(scanner.take_refused_statement(), refused, "{code}");
        assert!(!scanner.take_refused_statement());
    }
    let mut scanner = logged_in();
    scanner.sent(&message(b'Q', b"EXECUTE nosuch\0"));
    scanner.received(&error("ERROR", "26000"));
    assert!(!scanner.take_refused_statement(), "not one of ours");
}

#[test]
fn knows_what_kind_of_node_it_is() {
    let mut scanner = logged_in();
    assert_eq!((scanner.in_hot_standby(), scanner.read_only_by_default()), (None, None));
    scanner.received(&message(b'S', b"in_hot_standby\0on\0"));
    scanner.received(&message(b'S', b"default_transaction_read_only\0on\0"));
    assert_eq!((scanner.in_hot_standby(), scanner.read_only_by_default()), (Some(true), Some(true)));
    scanner.received(&message(b'S', b"in_hot_standby\0off\0"));
    scanner.received(&message(b'S', b"default_transaction_read_only\0off\0"));
    assert_eq!((scanner.in_hot_standby(), scanner.read_only_by_default()), (Some(false), Some(false)));
}

#[test]
fn a_stream_that_ended_is_lost_and_not_poisoned() {
    let mut scanner = logged_in();
    scanner.ended();
    assert!(scanner.is_lost() && !scanner.is_poisoned());
}
